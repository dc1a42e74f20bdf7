"""Reports on runs and sweeps: one self-contained HTML file to share, with the same figures as the job's page."""
