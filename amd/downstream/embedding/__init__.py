"""Embeddings: features of a data set, cached, computed across a cluster and written as Parquet files."""
