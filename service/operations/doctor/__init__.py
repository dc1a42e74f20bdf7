"""Checks that an operator would make, each with a remedy for any problem found. They change nothing."""
