"""Job details: history, log search, bad samples, changes and clones."""
