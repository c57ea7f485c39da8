"""Version of the database schema that this code needs."""

from importlib import resources


def read_required() -> str:
    """Return the number of the newest migration, like `0010`. Alembic stores it in the table `alembic_version`."""
    files = resources.files("sandbox_broker.database.migrations.versions").iterdir()
    return max(file.name.partition("_")[0] for file in files if file.name[0].isdigit())
