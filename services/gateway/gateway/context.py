from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.types import Scope

from gateway.allocator_client import AllocatorClient
from gateway.event_feed import EventFeed
from gateway.queries.status import StatusReporter
from gateway.settings import Settings
from gateway.web.auth import Auth
from gateway.web.client_address import ClientAddress
from gateway.web.named_tokens import NamedTokens
from gateway.web.rate_limit import RateLimits
from gateway.web.students_per_address import StudentsPerAddress
from gateway.web.webhook_signature import WebhookVerifier
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.runtime.access_keys import AccessKeys


@dataclass(frozen=True, slots=True)
class Context:
    """Dependencies of the routes, in `app.state.context`."""

    settings: Settings
    auth: Auth
    tokens: NamedTokens
    webhooks: WebhookVerifier
    rate_limits: RateLimits | None
    students_per_address: StudentsPerAddress | None
    client_address: Callable[[Scope], ClientAddress]
    engine: AsyncEngine
    publisher: Publisher
    rpc_client: RpcClient
    allocator: AllocatorClient
    event_feed: EventFeed
    status_reporter: StatusReporter
    access_keys: AccessKeys | None
