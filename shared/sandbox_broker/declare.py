"""`python -m sandbox_broker.declare`: declare every exchange, queue and binding in the RabbitMQ of AMQP_URL.

It also deletes the queues that earlier versions used and that have no consumer any more. It is for installations
in which the users of the services may not declare; otherwise the services do both themselves. Repeating it is
harmless.
"""

import asyncio
import logging

from aio_pika.exceptions import AMQPError
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import delete_replaced, opened
from sandbox_broker.runtime.settings import AmqpUrl, load, stop

TIMEOUT_SEC = 30.0


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True)

    amqp_url: AmqpUrl = Field(repr=False)


async def declare(amqp_url: str) -> None:
    """Raise AMQPError, OSError or TimeoutError when RabbitMQ does not answer or refuses. Replaced queues that
    cannot be deleted raise nothing."""
    async with asyncio.timeout(TIMEOUT_SEC), opened(amqp_url) as connection:
        async with connection.channel() as channel:
            await topology.declare(channel)
        await asyncio.gather(*(delete_replaced(connection, queue) for queue in topology.QUEUES))


def main() -> None:
    url = load(Settings).amqp_url
    for library in ("aio_pika", "aiormq"):  # they log what they raise
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        asyncio.run(declare(url))
    except (AMQPError, OSError, TimeoutError) as error:
        stop(f"AMQP_URL: {' '.join(str(error).split()) or type(error).__name__}")


if __name__ == "__main__":
    main()
