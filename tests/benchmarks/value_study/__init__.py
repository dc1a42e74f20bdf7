"""Study of the benefit of distillation on Fashion-MNIST. See __main__.py."""
