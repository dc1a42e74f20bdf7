"""Nearest-neighbour search in the embeddings written by a job."""
