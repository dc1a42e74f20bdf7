"""Operation of the control plane: liveness, readiness and Prometheus metrics."""
