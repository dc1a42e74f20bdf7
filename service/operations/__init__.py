"""Control-plane operations: liveness, readiness and Prometheus metrics."""
