"""Downstream use of encoders: embeddings, probes, fine-tuning and action detection."""
