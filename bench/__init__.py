"""`make bench`: measure the broker, and a plain FastAPI and asyncpg service for comparison."""
