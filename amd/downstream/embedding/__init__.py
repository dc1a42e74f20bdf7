"""Features of data sets: computed across a cluster, cached, and written as Parquet files."""
