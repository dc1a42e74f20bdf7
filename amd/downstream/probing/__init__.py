"""Probes of frozen features: k-nearest neighbours, linear classifiers and few-shot."""
