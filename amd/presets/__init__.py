"""Named, complete configs: pre-training, fine-tuning, detection and the demo. Torch-free."""
