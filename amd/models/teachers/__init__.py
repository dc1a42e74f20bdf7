"""Teachers: the frozen encoder that provides target features, and loading of timm ViTs."""
