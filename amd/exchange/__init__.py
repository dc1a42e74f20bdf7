"""Foreign weights in and out. Each layout is a named, tested table of keys; loading never executes code from a file."""
