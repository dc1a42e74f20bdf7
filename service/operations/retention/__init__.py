"""Retention: policies for removing old jobs, runs and records, and the removal itself."""
