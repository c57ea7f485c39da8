"""`make run`: the whole broker on this machine, in the foreground.

The parts that start private servers (`PrivatePostgres`, `PrivateRabbitMQ`) and services (`spawn`) are used by
the integration tests as well.
"""
