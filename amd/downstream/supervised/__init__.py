"""Supervised training on a pre-trained encoder: classification and action detection."""
