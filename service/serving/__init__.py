"""Serving: deployments of encoders on Ray Serve, and the gateway that routes requests to replicas."""
