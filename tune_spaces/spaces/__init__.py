"""Search spaces: parameters, studies, and the mapping from points to configs. Imports no torch, Ray or Optuna."""
