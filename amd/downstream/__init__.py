"""What an encoder is worth: probes on its frozen features."""
