"""The training loop on one rank: learner, optimizer, pre-training, and the collapse guard."""
