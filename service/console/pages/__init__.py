"""The console's pages, one module per navigation section."""
