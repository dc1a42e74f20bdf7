"""Search over masking ratios, alignment layers, generators and recipes: Ray Tune around the same launch as one run."""
