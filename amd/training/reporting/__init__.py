"""Reporting for runs: metrics, progress, bad samples, and checkpoint probes."""
