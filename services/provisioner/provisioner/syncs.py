"""Requests for a sync: they import created accounts as soon as CSP lists them."""

import math
import time

import structlog
from pamqp.commands import Basic

from provisioner import metrics
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import encode_commands
from sandbox_broker.contract.commands import SyncPool
from sandbox_broker.contract.replies import CreationsClaimed
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher, Unroutable
from sandbox_broker.observability import log_context, tracing

SLOWDOWN = 4
"""An account that CSP does not list after this many periods delays the next sync. So an account that never appears
does not cause a sync in each period for ever."""

log = structlog.get_logger()


class SyncRequests:
    """Requests a sync every `period_sec` while CSP has created accounts that no sync has imported."""

    def __init__(self, publisher: Publisher, period_sec: float) -> None:
        self._publisher = publisher
        self._period_sec = period_sec
        self._current_period_sec: float | None = None
        """None while no account is awaited."""
        self._requested_at = -math.inf

    def note_created(self) -> None:
        """Await the import of an account that was just created."""
        self._current_period_sec = self._period_sec

    def note_awaited(self, claimed: CreationsClaimed) -> None:
        """Take over the number of awaited accounts. The leader requests the syncs for all replicas."""
        is_awaited = claimed.on_duty and claimed.awaited > 0
        period_sec = max(self._period_sec, (claimed.awaited_sec or 0) / SLOWDOWN)
        self._current_period_sec = period_sec if is_awaited else None

    async def request_if_due(self) -> float | None:
        """Request a sync if one is due. Return the seconds until the next one, None if no account is awaited."""
        if self._current_period_sec is None:
            return None
        if time.monotonic() >= self._requested_at + self._current_period_sec:
            await self._request()
            self._requested_at = time.monotonic()
        return max(0.0, self._requested_at + self._current_period_sec - time.monotonic())

    async def _request(self) -> None:
        command = SyncPool(request_id=log_context.request_id() or "stock", traceparent=tracing.traceparent())
        # Without a csp-syncer, older requests expire instead of piling up.
        properties = Basic.Properties(delivery_mode=2, expiration=str(round(self._period_sec * 1000)))
        try:
            await self._publisher.publish(
                topology.COMMANDS_FROM_PROVISIONER.name,
                topology.SYNCER_COMMANDS.name,
                encode_commands([command]),
                properties,
            )
        except (Disconnected, Unroutable) as error:
            log.warning("sync.not_requested", error=str(error))
        else:
            metrics.SYNCS.inc()
            log.info("sync.requested")
