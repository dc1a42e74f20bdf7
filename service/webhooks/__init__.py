"""Whoever wants to hear of job events gets them by HTTP: kept with the event, sent until they are taken."""
