"""Import and export of third-party weights.

Each layout is a named, tested table of keys. Loading never executes code from a file.
"""
