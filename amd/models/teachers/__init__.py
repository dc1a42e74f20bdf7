"""Teachers: frozen encoders that provide target features, including ViTs from timm."""
