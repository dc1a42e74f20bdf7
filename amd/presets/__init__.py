"""Presets: named, complete configs for pre-training, fine-tuning, detection and the demo. Torch-free."""
