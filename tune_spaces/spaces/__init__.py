"""Search spaces: parameters, studies, and the mapping from points to configs. Does not import torch, Ray or Optuna."""
