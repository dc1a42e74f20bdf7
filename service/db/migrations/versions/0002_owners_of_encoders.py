"""Add a project to every encoder; encoders that no job published belong to `default`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    encoders = sa.table("encoders", sa.column("id", sa.String), sa.column("project", sa.String))
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("project", sa.String))
    of_job = sa.select(jobs.c.project).where(jobs.c.id == encoders.c.id).scalar_subquery()
    unowned = encoders.update().where(encoders.c.project.is_(None))
    op.execute(unowned.values(project=sa.func.coalesce(of_job, "default")))
    with op.batch_alter_table("encoders", schema=None) as batch_op:
        batch_op.alter_column("project", existing_type=sa.String(length=64), nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("encoders", schema=None) as batch_op:
        batch_op.alter_column("project", existing_type=sa.String(length=64), nullable=True)
