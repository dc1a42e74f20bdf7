"""Data sets that installed packages contain, written as ordinary folders and lists. Nothing is downloaded."""
