"""Jobs: submitted over REST, queued in the database, run on Ray, watched through the storage root. No torch."""
