"""HTTP code shared by all routes: errors, middleware, pagination, base schemas."""
