"""Checks that an operator would make, each with the remedy for what it finds. They change nothing."""
