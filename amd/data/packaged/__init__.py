"""Data sets that ship with installed packages, written as ordinary folders and list files. Nothing is downloaded."""
