"""`service.serve:app`: stable import path of the Ray Serve application that serves encoders."""

from service.inference.replica import app

__all__ = ["app"]
