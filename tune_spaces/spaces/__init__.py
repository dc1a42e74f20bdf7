"""Search spaces: parameters, studies, and how a point becomes a config. No torch, Ray or Optuna."""
