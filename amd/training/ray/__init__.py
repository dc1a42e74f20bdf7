"""Ray Train: the cluster, the worker group, and the coordinator actor between workers and driver."""
