"""The front: the `amd` command now; the control plane and the serving of encoders stand here later."""
