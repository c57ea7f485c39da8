"""Development stack: `make run` starts the whole broker on this machine, in the foreground.

Tests and benchmarks use the same private servers (`PrivatePostgres`, `PrivateRabbitMQ`) and processes (`spawn`).
"""
