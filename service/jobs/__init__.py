"""Jobs: submitted over REST, queued in the database, run on Ray, followed through the storage root. Torch-free."""
