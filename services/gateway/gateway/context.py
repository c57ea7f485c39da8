from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.types import Scope

from gateway.auth import Auth
from gateway.limits import Limits
from gateway.outlook import Outlook
from gateway.replies import Allocator
from gateway.settings import Settings
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import Requester


@dataclass(frozen=True, slots=True)
class Context:
    """What the routes work with: `app.state.context`."""

    settings: Settings
    auth: Auth
    limits: Limits | None
    client_address: Callable[[Scope], str]
    engine: AsyncEngine
    publisher: Publisher
    requester: Requester
    allocator: Allocator
    outlook: Outlook
