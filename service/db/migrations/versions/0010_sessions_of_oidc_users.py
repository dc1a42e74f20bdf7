"""Allow browser sessions without an API key, for users who sign in through the OIDC issuer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("browser_sessions", schema=None) as batch_op:
        batch_op.alter_column("key_id", existing_type=sa.String(length=32), nullable=True)
        batch_op.add_column(sa.Column("caller_id", sa.String(length=100), nullable=True))
        batch_op.add_column(sa.Column("project", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("scopes", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.execute("DELETE FROM browser_sessions WHERE key_id IS NULL")
    with op.batch_alter_table("browser_sessions", schema=None) as batch_op:
        batch_op.drop_column("scopes")
        batch_op.drop_column("project")
        batch_op.drop_column("caller_id")
        batch_op.alter_column("key_id", existing_type=sa.String(length=32), nullable=False)
