"""Inference in a Ray Serve replica: decoding, batching and the forward pass. No HTTP."""
