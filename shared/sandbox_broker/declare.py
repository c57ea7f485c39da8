"""`python -m sandbox_broker.declare`: declare all exchanges, queues and bindings in the RabbitMQ of AMQP_URL.

The command also deletes replaced queues of earlier versions without a consumer. It is for installations where the
users of the services may not declare; otherwise the services do both themselves. The command is idempotent.
"""

import asyncio
import logging

from aio_pika.exceptions import AMQPError
from pydantic import Field

from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import delete_replaced, open_connection
from sandbox_broker.runtime import event_loop
from sandbox_broker.runtime.server_urls import format_amqp_servers
from sandbox_broker.runtime.settings import AmqpUrl, EnvironmentSettings, load, stop

TIMEOUT_SEC = 30.0


class Settings(EnvironmentSettings):
    amqp_url: AmqpUrl = Field(repr=False)


async def declare(amqp_url: str) -> None:
    """Declare the topology and delete replaced queues. Raises AMQPError, OSError or TimeoutError if RabbitMQ does
    not answer or refuses. A replaced queue that cannot be deleted is not an error."""
    async with asyncio.timeout(TIMEOUT_SEC), open_connection(amqp_url) as connection:
        async with connection.channel() as channel:
            await topology.declare(channel)
        await asyncio.gather(*(delete_replaced(connection, queue) for queue in topology.QUEUES))


def main() -> None:
    url = load(Settings).amqp_url
    for library in ("aio_pika", "aiormq"):  # because they also log the errors that they raise
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        event_loop.run(declare(url))
    except (AMQPError, OSError, TimeoutError) as error:
        stop(f"AMQP_URL: {format_amqp_servers(url)}: {' '.join(str(error).split()) or type(error).__name__}")


if __name__ == "__main__":
    main()
