"""Control-plane operations: health, metrics, cluster status, diagnosis and retention."""
