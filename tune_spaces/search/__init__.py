"""Execution of a sweep: sampling of points, early stopping, population based training, trials on Ray Tune."""
