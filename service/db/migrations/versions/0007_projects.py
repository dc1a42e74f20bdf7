"""Add tables for projects and audited changes, the resources reserved for attempts, and an index on project queues."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("policy", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("changed_at", sa.Double(), nullable=False),
        sa.Column("changed_by", sa.String(length=100), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(length=100), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=True),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("target", sa.String(length=200), nullable=False),
        sa.Column("outcome", sa.String(length=200), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("audit", schema=None) as batch_op:
        batch_op.create_index("audit_by_time", ["at", "id"], unique=False)
        batch_op.create_index("audit_of_project", ["project", "at", "id"], unique=False)
        batch_op.create_index("audit_of_target", ["target", "at", "id"], unique=False)
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        columns = ["state", "project", "priority", "created_at", "id"]
        batch_op.create_index("jobs_in_queue_of_project", columns, unique=False)
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("cpus", sa.Double(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("gpus", sa.Double(), nullable=False, server_default="0"))
        batch_op.create_index("attempts_by_end", ["ended_at"], unique=False)
    # Whether a job with device=auto used GPUs depended on the cluster, so only jobs that required GPUs are counted.
    gpus = "CASE WHEN jobs.device = 'cuda' THEN jobs.workers ELSE 0 END"
    op.execute(
        f"UPDATE attempts SET cpus = (SELECT jobs.cpus FROM jobs WHERE jobs.id = attempts.job_id), "
        f"gpus = (SELECT {gpus} FROM jobs WHERE jobs.id = attempts.job_id)"
    )


def downgrade() -> None:
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.drop_index("attempts_by_end")
        batch_op.drop_column("gpus")
        batch_op.drop_column("cpus")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("jobs_in_queue_of_project")
    op.drop_table("audit")
    op.drop_table("projects")
