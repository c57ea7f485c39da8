"""Creation of one account: one attempt in CSP, and its record with the allocator."""

import time
import uuid

import structlog

from provisioner import metrics
from provisioner.settings import Settings
from sandbox_broker.contract.commands import RecordCreation, RecordCreationFailure
from sandbox_broker.contract.replies import DueCreation
from sandbox_broker.csp.backoff import compute_backoff
from sandbox_broker.csp.circuit_breaker import CspCircuit
from sandbox_broker.csp.client import CspClient, CspRefused, CspUnauthorized, CspUnavailable
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone
from sandbox_broker.observability import log_context, tracing

LOOK_UP_TIMEOUT_SEC = 30.0
MAX_ERROR_LENGTH = 500
DESCRIPTION = "Sandbox for a student of a hands-on lab, created by the Sandbox Broker"
TAGS = {"created_by": "sandbox-broker"}
SETTLED = frozenset({409, 429, 503})
"""Statuses after which CSP creates no account any more. After any other error the account may still appear."""

log = structlog.get_logger()


class Creator:
    """Creates accounts in CSP, one attempt per claim."""

    def __init__(
        self,
        settings: Settings,
        csp: CspClient,
        look_up: CspClient,
        allocator: MaintenanceClient,
        circuit: CspCircuit,
    ) -> None:
        """`csp` has the time-out of a creation, `look_up` the shorter one of a look-up by name."""
        self._settings = settings
        self._csp = csp
        self._look_up = look_up
        self._allocator = allocator
        self._circuit = circuit

    @property
    def max_duration_sec(self) -> float:
        """Longest duration of one attempt: the look-up by name, then the creation."""
        return LOOK_UP_TIMEOUT_SEC + self._settings.create_timeout_sec

    async def create(self, run_id: uuid.UUID, creation: DueCreation, begin_by: float) -> bool:
        """Create the account, or find the one of an earlier attempt, and record the outcome. Return whether CSP has
        the account.

        If this process dies meanwhile, the claim ends, and the next attempt looks the name up. An attempt that has
        not begun by `begin_by` (monotonic clock) is dropped, because its claim may have ended and another run may
        have taken the creation over.
        """
        name = "create account"
        with (
            log_context.bound(request_id=creation.request_id, creation_id=creation.creation_id, name=creation.name),
            # A creation is traced if and only if its request is.
            tracing.child_span(name, parent=creation.traceparent)
            if creation.request_id
            else tracing.root_span(name),
        ):
            return await self._create(run_id, creation, begin_by)

    async def _create(self, run_id: uuid.UUID, creation: DueCreation, begin_by: float) -> bool:
        began = time.monotonic()
        is_sent = False
        try:
            external_id = await self._find(creation)
            found = external_id is not None
            if external_id is None:
                if time.monotonic() > begin_by + LOOK_UP_TIMEOUT_SEC:
                    log.warning("creation.dropped", error="this process was frozen, and its claim may have ended")
                    return False
                is_sent = True
                external_id = await self._csp.create_account(
                    creation.name, description=DESCRIPTION, tags=TAGS, admin_user=creation.admin_user
                )
        except CspUnauthorized as error:
            # The claim ends by itself, because the refusal says nothing about this account.
            self._circuit.record_unauthorized()
            log.error("creation.unauthorized", error=str(error))
            return False
        except CspRefused as error:
            self._circuit.record_success()  # CSP works
            await self._record_failure(run_id, creation, str(error), "refused", self._compute_delay(creation, None))
            return False
        except CspUnavailable as error:
            self._circuit.record_failure()
            delay = self._compute_delay(creation, error.retry_after)
            if is_sent and error.status not in SETTLED:
                # A look-up before CSP has ended the creation would find no account, and a second one would follow.
                delay = max(delay, self._settings.create_timeout_sec)
            await self._record_failure(run_id, creation, str(error), "unavailable", delay)
            return False
        except ValueError as error:  # an invalid name: another attempt cannot help
            await self._record_failure(run_id, creation, str(error), "invalid", None)
            return False
        self._circuit.record_success()
        (metrics.FOUND if found else metrics.CREATED).inc()
        metrics.DURATION.observe(time.monotonic() - began)
        log.info("csp.found" if found else "csp.created", external_id=external_id)
        await self._record(RecordCreation(creation_id=creation.creation_id, external_id=external_id))
        return True

    async def _find(self, creation: DueCreation) -> str | None:
        """Return the account of an earlier attempt, whose record may have been lost."""
        if not creation.claimed_before:
            return None
        return await self._look_up.find_account_by_name(creation.name)

    def _compute_delay(self, creation: DueCreation, retry_after_sec: float | None) -> float:
        base_sec, max_sec = self._settings.create_backoff_base_sec, self._settings.create_backoff_max_sec
        return compute_backoff(creation.attempts, base_sec, max_sec, retry_after_sec)

    async def _record_failure(
        self, run_id: uuid.UUID, creation: DueCreation, error: str, reason: str, retry_in_sec: float | None
    ) -> None:
        metrics.FAILED.labels(reason).inc()
        log.warning("csp.create_failed", error=error, reason=reason, retry_in_sec=retry_in_sec)
        await self._record(
            RecordCreationFailure(
                run_id=run_id,
                creation_id=creation.creation_id,
                attempts=creation.attempts,
                error=error[:MAX_ERROR_LENGTH],
                retry_in_sec=retry_in_sec,
                refused=reason == "refused",
                max_failures=self._settings.create_max_failures,
            )
        )

    async def _record(self, command: RecordCreation | RecordCreationFailure) -> None:
        try:
            await self._allocator.request(command)
        except CommandNotDone as error:  # the creation is due again when its claim ends
            log.warning("creation.not_recorded", error=str(error))
