"""Projects: scheduling policies with quotas and budgets, hours used by jobs, and the audit log."""
