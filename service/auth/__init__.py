"""Authentication and authorization: API keys, OIDC tokens, rate limits, and the URIs that jobs may read."""
