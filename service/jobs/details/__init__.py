"""Details of a job for people and programs: history, log search, bad samples, changes and clones."""
