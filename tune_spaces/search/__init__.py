"""Running a sweep: the next point, early stopping, population based training, trials on Ray Tune."""
