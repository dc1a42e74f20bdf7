"""Ray Train: the cluster, its worker groups, and the coordinator between driver and workers."""
