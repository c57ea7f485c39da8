"""`python -m sandbox_broker.declare`: gives the RabbitMQ of AMQP_URL every exchange, queue and binding.

For where the services' own users may not do that; otherwise they do it themselves. Repeating it is harmless.
"""

import asyncio
import logging

from aio_pika.exceptions import AMQPError
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from sandbox_broker import topology
from sandbox_broker.connection import opened
from sandbox_broker.settings import AmqpUrl, load, stop

TIMEOUT_SEC = 30.0


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True)

    amqp_url: AmqpUrl = Field(repr=False)


async def declare(amqp_url: str) -> None:
    """Raises AMQPError, OSError or TimeoutError when RabbitMQ does not answer or refuses."""
    async with asyncio.timeout(TIMEOUT_SEC):
        async with opened(amqp_url) as connection, connection.channel() as channel:
            await topology.declare(channel)


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
