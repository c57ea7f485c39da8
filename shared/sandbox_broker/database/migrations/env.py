"""Entry point of Alembic. It runs the migrations on the connection from sandbox_broker.migrate."""

from alembic import context

from sandbox_broker.database import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
