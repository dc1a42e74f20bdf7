"""Stable import paths of the Ray Serve applications: `service.serve:app` (encoders) and `service.serve:lab`."""

from service.inference.lab_replica import lab
from service.inference.replica import app

__all__ = ["app", "lab"]
