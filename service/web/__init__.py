"""What every HTTP route shares: errors, middleware, pagination."""
