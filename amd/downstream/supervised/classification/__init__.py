"""Fine-tuning of a classifier on a pre-trained encoder, with multi-view evaluation."""
