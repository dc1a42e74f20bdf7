"""The training loop of one rank: learner, optimizer, pre-training, and the collapse guard."""
