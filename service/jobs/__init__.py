"""Jobs: submitted over REST, queued in the database, run on Ray, monitored through the storage root.

Does not import torch.
"""
