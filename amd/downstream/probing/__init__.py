"""Probes of frozen features: k-nearest neighbours, linear and few-shot classifiers."""
