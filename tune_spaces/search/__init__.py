"""Running a sweep: sampling points, early stopping, population-based training, and trials on Ray Tune."""
