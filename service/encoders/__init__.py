"""Serving: the registry of encoders, their deployments, and what a replica runs to answer requests."""
