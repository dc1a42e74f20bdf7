"""Presets: named, complete configs of pre-training, fine-tuning, detection and the demo. Independent of PyTorch."""
