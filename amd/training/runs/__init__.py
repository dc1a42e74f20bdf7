"""Runs from config to published encoder: checks, teacher, launch, publishing."""
