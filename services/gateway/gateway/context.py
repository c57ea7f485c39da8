from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.auth import Auth
from gateway.replies import Allocator
from gateway.settings import Settings
from sandbox_broker.bus import Publisher, Requester


@dataclass(frozen=True, slots=True)
class Context:
    """What the routes work with: `app.state.context`."""

    settings: Settings
    auth: Auth
    engine: AsyncEngine
    publisher: Publisher
    requester: Requester
    allocator: Allocator
