"""Features of data sets: computed across a cluster, cached, or written as Parquet files."""
