"""Reports on runs and sweeps: one self-contained HTML file to send, with the numbers of the job's page."""
