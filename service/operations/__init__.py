"""Operating the control plane: liveness, readiness and Prometheus metrics."""
