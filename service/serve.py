"""`service.serve:app`: the import path under which Ray Serve knows the application that serves encoders."""

from service.inference.replica import app

__all__ = ["app"]
