"""Fine-tuning a pre-trained encoder as a classifier, with multi-view evaluation."""
