"""One deletion: CSP is asked once, and the allocator is told how it went."""

import time
import uuid
from enum import Enum, auto

import structlog

from reaper import metrics, services
from reaper.asking import NoAnswer, ask
from reaper.backoff import retry_in_sec
from reaper.circuit import Circuit, State
from reaper.settings import Settings
from sandbox_broker import story, tracing
from sandbox_broker.bus import Requester
from sandbox_broker.csp import CspClient, CspUnauthorized, CspUnavailable
from sandbox_broker.messages import DueDeletion, RecordDeletion, RecordDeletionFailure
from sandbox_broker.niosxaas import NiosxaasClient

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

    def __init__(
        self, settings: Settings, csp: CspClient, niosxaas: NiosxaasClient | None, requester: Requester
    ) -> None:
        self._settings = settings
        self._csp = csp
        self._niosxaas = niosxaas
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

    @property
    def longest_sec(self) -> float:
        """How long CSP may take for one deletion, and for what comes before it."""
        return CSP_TIMEOUT_SEC + self._preparing_sec

    @property
    def _preparing_sec(self) -> float:
        return services.TIMEOUT_SEC if self._niosxaas is not None else 0

    async def delete(self, run_id: uuid.UUID, deletion: DueDeletion, begin_by: float) -> Outcome:
        """Dying in between is harmless: the claim ends, and the next attempt finds the account gone. Past
        `begin_by`, on the monotonic clock, that may have happened already: raises NoAnswer.

        What CSP no longer lists it is not asked to delete. Should a later listing have it after all, that opens the
        deletion again."""
        name = "delete sandbox"
        with (
            story.bound(request_id=deletion.request_id, sandbox_id=deletion.sandbox_id),
            # Of a request that is not traced its deletion is not either.
            tracing.within(name, parent=deletion.traceparent) if deletion.request_id else tracing.beginning(name),
        ):
            return await self._delete(run_id, deletion, begin_by)

    async def _delete(self, run_id: uuid.UUID, deletion: DueDeletion, begin_by: float) -> Outcome:
        if deletion.missing:
            log.info("csp.missing")
            await self._record(RecordDeletion(sandbox_id=deletion.sandbox_id))
            return Outcome.DELETED
        problem: str | None = None
        try:
            if self._niosxaas is not None:
                problem = await services.remove_services(self._niosxaas, deletion)
            if time.monotonic() > begin_by + self._preparing_sec:
                raise NoAnswer("this process was frozen, and its claim may have ended")
            outcome = await self._csp.delete_account(deletion.external_id)
        except CspUnauthorized as error:
            self._refusing.failed(time.monotonic())
            metrics.UNAUTHORIZED.set(1)
            log.error("cleanup.unauthorized", error=str(error))
            return Outcome.REFUSED
        except CspUnavailable as error:
            self._failing.failed(time.monotonic())
            retry_in = retry_in_sec(self._settings, deletion.attempts, error.retry_after)
            await self._record_failure(run_id, deletion, str(error), retry_in, problem)
            return Outcome.FAILED
        except ValueError as error:  # an external id that is none: no attempt can help
            await self._record_failure(run_id, deletion, str(error), None, problem)
            return Outcome.FAILED
        self._accepted()
        metrics.DELETED.inc()
        log.info("csp.deleted", outcome=outcome)
        if outcome == "already_gone":
            problem = None  # gone with the account
        await self._record(RecordDeletion(sandbox_id=deletion.sandbox_id, services_error=_short(problem)))
        return Outcome.DELETED

    def _accepted(self) -> None:
        now = time.monotonic()
        self._failing.succeeded(now)
        self._refusing.succeeded(now)
        metrics.UNAUTHORIZED.set(0)

    def refusal_is_over(self) -> None:
        """Another run has dealt with what CSP refused us: how our token is now its reaper tells."""
        metrics.UNAUTHORIZED.set(0)

    async def _record_failure(
        self,
        run_id: uuid.UUID,
        deletion: DueDeletion,
        error: str,
        retry_in: float | None,
        services_error: str | None,
    ) -> None:
        metrics.FAILED.inc()
        log.warning("csp.delete_failed", error=error, retry_in_sec=retry_in)
        await self._record(
            RecordDeletionFailure(
                run_id=run_id,
                sandbox_id=deletion.sandbox_id,
                attempts=deletion.attempts,
                error=error[:MAX_ERROR],
                retry_in_sec=retry_in,
                services_error=_short(services_error),
            )
        )

    async def _record(self, command: RecordDeletion | RecordDeletionFailure) -> None:
        try:
            await ask(self._requester, command)
        except NoAnswer as error:  # it stays claimed, and is due again when the claim ends
            log.warning("deletion.not_recorded", error=str(error))


def _short(error: str | None) -> str | None:
    return None if error is None else error[:MAX_ERROR]
