"""Add the table for revisions of deployments, with the current settings of each deployment as its first revision."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "deployment_revisions",
        sa.Column("deployment", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(length=100), nullable=False),
        sa.Column("encoder", sa.String(length=200), nullable=False),
        sa.Column("candidate", sa.String(length=200), nullable=True),
        sa.Column("share", sa.Double(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("resolved", sa.JSON(), nullable=False),
        sa.Column("restored", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["deployment"], ["deployments.name"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("deployment", "number"),
    )
    # What the aliases referred to at the time of the change is unknown, so the encoders that serve now are recorded.
    op.execute(
        "INSERT INTO deployment_revisions "
        "(deployment, number, created_at, actor, encoder, candidate, share, settings, resolved) "
        "SELECT name, 1, changed_at, created_by, encoder, candidate, share, settings, serving FROM deployments"
    )


def downgrade() -> None:
    op.drop_table("deployment_revisions")
