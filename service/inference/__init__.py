"""Inference in a Ray Serve replica: decode files, batch clips, run the forward pass."""
