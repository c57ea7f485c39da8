"""Deletion of one sandbox: one attempt in CSP, and its record with the allocator."""

import time
import uuid
from enum import Enum, auto

import structlog

from reaper import metrics, niosxaas_cleanup
from reaper.backoff import compute_retry_delay
from reaper.settings import Settings
from sandbox_broker.contract.commands import RecordDeletion, RecordDeletionFailure
from sandbox_broker.contract.replies import DueDeletion
from sandbox_broker.csp.circuit_breaker import UNAUTHORIZED, CspCircuit, State
from sandbox_broker.csp.client import CspClient, CspUnauthorized, CspUnavailable
from sandbox_broker.csp.niosxaas import NiosxaasClient
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone
from sandbox_broker.observability import log_context, tracing

CSP_TIMEOUT_SEC = 30.0
MAX_ERROR_LENGTH = 500

log = structlog.get_logger()


class Outcome(Enum):
    DELETED = auto()
    FAILED = auto()
    """The attempt counts."""
    REFUSED = auto()
    """CSP refuses the broker's token. The attempt does not count, because it says nothing about the sandbox."""


class Deleter:
    """Deletes sandboxes, and decides by a circuit breaker whether to call CSP."""

    def __init__(
        self, settings: Settings, csp: CspClient, niosxaas: NiosxaasClient | None, allocator: MaintenanceClient
    ) -> None:
        self._settings = settings
        self._csp = csp
        self._niosxaas = niosxaas
        self._allocator = allocator
        self._circuit = CspCircuit(settings.circuit_breaker_threshold, settings.circuit_breaker_timeout_sec)

    @property
    def state(self) -> State:
        """CLOSED: call CSP within the throttles. HALF_OPEN: call it once. OPEN: do not call it."""
        return self._circuit.state

    @property
    def seconds_until_half_open(self) -> float:
        return self._circuit.seconds_until_half_open

    @property
    def obstacle(self) -> str:
        """The reason why the circuit breaker is not closed."""
        return self._circuit.obstacle

    @property
    def max_duration_sec(self) -> float:
        """Longest duration of one deletion in CSP, with the NIOSXaaS clean-up before it."""
        return CSP_TIMEOUT_SEC + self._max_preparation_sec

    @property
    def _max_preparation_sec(self) -> float:
        return niosxaas_cleanup.TIMEOUT_SEC if self._niosxaas is not None else 0

    async def delete(self, run_id: uuid.UUID, deletion: DueDeletion, begin_by: float) -> Outcome:
        """Delete the sandbox in CSP and record the outcome.

        If this process dies meanwhile, the claim ends and the next attempt finds the account gone. Raises
        CommandNotDone when the deletion has not begun by `begin_by` (monotonic clock), because the claim may have
        ended and another run may have taken the deletion over.

        CSP gets no request for an account that it no longer lists. If a later listing contains the account again,
        the allocator opens the deletion again.
        """
        name = "delete sandbox"
        with (
            log_context.bound(request_id=deletion.request_id, sandbox_id=deletion.sandbox_id),
            # A deletion is traced if and only if its request is.
            tracing.child_span(name, parent=deletion.traceparent)
            if deletion.request_id
            else tracing.root_span(name),
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
                problem = await niosxaas_cleanup.remove_services(self._niosxaas, deletion)
            if time.monotonic() > begin_by + self._max_preparation_sec:
                raise CommandNotDone("this process was frozen, and its claim may have ended")
            outcome = await self._csp.delete_account(deletion.external_id)
        except CspUnauthorized as error:
            self._circuit.record_unauthorized()
            log.error("cleanup.unauthorized", error=str(error))
            return Outcome.REFUSED
        except CspUnavailable as error:
            self._circuit.record_failure()
            retry_in = compute_retry_delay(self._settings, deletion.attempts, error.retry_after)
            await self._record_failure(run_id, deletion, str(error), retry_in, problem)
            return Outcome.FAILED
        except ValueError as error:  # an invalid external id: another attempt cannot help
            await self._record_failure(run_id, deletion, str(error), None, problem)
            return Outcome.FAILED
        self._circuit.record_success()
        metrics.DELETED.inc()
        log.info("csp.deleted", outcome=outcome)
        if outcome == "already_gone":
            problem = None  # the services are gone with the account
        await self._record(RecordDeletion(sandbox_id=deletion.sandbox_id, services_error=_truncate(problem)))
        return Outcome.DELETED

    def clear_unauthorized(self) -> None:
        """Reset the metric, because another reaper now reports whether the token is valid."""
        UNAUTHORIZED.set(0)

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
                error=error[:MAX_ERROR_LENGTH],
                retry_in_sec=retry_in,
                services_error=_truncate(services_error),
            )
        )

    async def _record(self, command: RecordDeletion | RecordDeletionFailure) -> None:
        try:
            await self._allocator.request(command)
        except CommandNotDone as error:  # the deletion is due again when its claim ends
            log.warning("deletion.not_recorded", error=str(error))


def _truncate(error: str | None) -> str | None:
    return None if error is None else error[:MAX_ERROR_LENGTH]
