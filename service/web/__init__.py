"""Shared by every HTTP route: errors, middleware, pagination, base schemas."""
