"""Hyperparameter search over masking ratios, alignment layers, generators and recipes, on Ray Tune."""
