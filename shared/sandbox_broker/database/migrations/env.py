"""Alembic's entry: runs the migrations on the connection that sandbox_broker.migrate hands over."""

from alembic import context

from sandbox_broker.database import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
