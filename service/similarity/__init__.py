"""Nearest neighbours among the embeddings that a job has written."""
