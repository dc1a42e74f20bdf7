"""Teachers: the frozen encoder that a student is compared with, and timm ViTs converted to it."""
