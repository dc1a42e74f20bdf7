"""Foreign weights in and out. Every layout is a named table with a test; nothing a file contains is executed."""
