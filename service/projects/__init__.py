"""Projects: scheduling policies with quotas and budgets, the hours that jobs used, and the audit log."""
