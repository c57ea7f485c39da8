"""One deletion: CSP is asked once, and the allocator is told how it went."""

import time
import uuid
from enum import Enum, auto

import structlog

from reaper import metrics
from reaper.asking import NoAnswer, ask
from reaper.backoff import retry_in_sec
from reaper.circuit import Circuit, State
from reaper.settings import Settings
from sandbox_broker.bus import Requester
from sandbox_broker.csp import CspClient, CspUnauthorized, CspUnavailable
from sandbox_broker.messages import DueDeletion, RecordDeletion, RecordDeletionFailure

CSP_TIMEOUT_SEC = 30.0
MAX_ERROR = 500

log = structlog.get_logger()


class Outcome(Enum):
    DELETED = auto()
    FAILED = auto()
    """An attempt was used up."""
    REFUSED = auto()
    """CSP does not take our token; the sandbox is not to blame."""


class Deleter:
    """Knows whether CSP is worth asking: one circuit for its failures, one for our token, which a single refusal
    opens."""

    def __init__(self, settings: Settings, csp: CspClient, requester: Requester) -> None:
        self._settings = settings
        self._csp = csp
        self._requester = requester
        self._failing = Circuit(settings.circuit_breaker_threshold, settings.circuit_breaker_timeout_sec)
        self._refusing = Circuit(1, settings.circuit_breaker_timeout_sec)

    @property
    def state(self) -> State:
        """Whether to ask CSP: CLOSED as often as allowed, HALF_OPEN once, OPEN not at all."""
        now = time.monotonic()
        return max(self._failing.state(now), self._refusing.state(now))

    @property
    def half_open_in_sec(self) -> float:
        now = time.monotonic()
        return max(self._failing.half_open_in_sec(now), self._refusing.half_open_in_sec(now))

    @property
    def obstacle(self) -> str:
        """Why the circuit is not closed."""
        if self._refusing.state(time.monotonic()) is not State.CLOSED:
            return "CSP refuses our token"
        return "CSP keeps failing"

    async def delete(self, run_id: uuid.UUID, deletion: DueDeletion) -> Outcome:
        """Dying in between is harmless: the claim ends, and the next attempt finds the account gone.

        What CSP no longer lists it is not asked to delete. Should a later listing have it after all, that opens the
        deletion again."""
        if deletion.missing:
            log.info("csp.missing", sandbox_id=deletion.sandbox_id)
            await self._record(RecordDeletion(sandbox_id=deletion.sandbox_id))
            return Outcome.DELETED
        try:
            outcome = await self._csp.delete_account(deletion.external_id)
        except CspUnauthorized as error:
            self._refusing.failed(time.monotonic())
            metrics.UNAUTHORIZED.set(1)
            log.error("cleanup.unauthorized", sandbox_id=deletion.sandbox_id, error=str(error))
            return Outcome.REFUSED
        except CspUnavailable as error:
            self._failing.failed(time.monotonic())
            retry_in = retry_in_sec(self._settings, deletion.attempts, error.retry_after)
            await self._record_failure(run_id, deletion, str(error), retry_in)
            return Outcome.FAILED
        except ValueError as error:  # an external id that is none: no attempt can help
            await self._record_failure(run_id, deletion, str(error), None)
            return Outcome.FAILED
        self._accepted()
        metrics.DELETED.inc()
        log.info("csp.deleted", sandbox_id=deletion.sandbox_id, outcome=outcome)
        await self._record(RecordDeletion(sandbox_id=deletion.sandbox_id))
        return Outcome.DELETED

    def _accepted(self) -> None:
        now = time.monotonic()
        self._failing.succeeded(now)
        self._refusing.succeeded(now)
        metrics.UNAUTHORIZED.set(0)

    async def _record_failure(
        self, run_id: uuid.UUID, deletion: DueDeletion, error: str, retry_in: float | None
    ) -> None:
        metrics.FAILED.inc()
        log.warning("csp.delete_failed", sandbox_id=deletion.sandbox_id, error=error, retry_in_sec=retry_in)
        await self._record(
            RecordDeletionFailure(
                run_id=run_id,
                sandbox_id=deletion.sandbox_id,
                attempts=deletion.attempts,
                error=error[:MAX_ERROR],
                retry_in_sec=retry_in,
            )
        )

    async def _record(self, command: RecordDeletion | RecordDeletionFailure) -> None:
        try:
            await ask(self._requester, command)
        except NoAnswer as error:  # it stays claimed, and is due again when the claim ends
            log.warning("deletion.not_recorded", sandbox_id=command.sandbox_id, error=str(error))
