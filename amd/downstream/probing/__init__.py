"""Probes on frozen features: k-nearest neighbours, linear, few-shot and attentive classifiers."""
