"""Authentication and authorization: API keys, OIDC tokens, rate limits, and the URIs a job may read."""
