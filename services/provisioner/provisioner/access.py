"""Logins inside sandboxes: one attempt to create or to remove a login in CSP, and the record of its outcome.

Each step can be repeated: a session enters the account again, CSP refuses a second user with the same email, the
password of a login is the same in each claim, and a missing user counts as deleted. So an attempt that follows a
dead one ends with the same user.
"""

import asyncio
import random

import structlog

from provisioner import metrics
from provisioner.settings import Settings
from sandbox_broker.contract.commands import RecordAccess, RecordAccessFailure, RecordAccessRemoval
from sandbox_broker.contract.replies import DueAccess
from sandbox_broker.csp.circuit_breaker import CircuitBreaker
from sandbox_broker.csp.http import CspError, CspHttp, CspRefused, CspUnauthorized, CspUnavailable
from sandbox_broker.csp.sessions import SessionClient, SessionExpired, SessionPool, SwitchRefused, hidden_forms
from sandbox_broker.csp.users import UserClient
from sandbox_broker.observability import log_context, tracing
from sandbox_broker.runtime.access_keys import AccessKeys, UnknownKey

RETRY_SEC = 5.0
"""Time between two attempts. A new account refuses each sign-in for minutes, and a student waits for the login."""
LATE_RETRY_SEC = 60.0
"""Time between two attempts after ACCESS_TIMEOUT_SEC."""
MAX_ERROR_LENGTH = 500

SIGN_IN_REFUSED = (
    "CSP refuses the sign-in of the broker's administrator. The operator must correct CSP_LOGIN_EMAIL and "
    "CSP_LOGIN_PASSWORD. The broker then creates the login by itself."
)
KEY_UNKNOWN = (
    "The provisioner cannot read the stored password. The operator must add its key to ACCESS_KEYS. The broker "
    "then creates the login by itself."
)

AccessRecord = RecordAccess | RecordAccessFailure | RecordAccessRemoval

log = structlog.get_logger()


class AccessWorker:
    """Creates and removes logins, one attempt per claim."""

    def __init__(self, settings: Settings, keys: AccessKeys, circuit: CircuitBreaker) -> None:
        password = settings.csp_login_password.get_secret_value()
        self._settings = settings
        self._keys = keys
        self._circuit = circuit
        self._http = CspHttp(
            settings.csp_base_url, secrets=hidden_forms(password), timeout_sec=settings.access_attempt_timeout_sec
        )
        client = SessionClient(self._http, settings.csp_login_email, password)
        self._sessions = SessionPool(client, settings.circuit_breaker_timeout_sec)
        self._users = UserClient(self._http)

    @property
    def is_sign_in_refused(self) -> bool:
        return self._sessions.is_refused

    async def aclose(self) -> None:
        await self._http.aclose()

    async def carry_out(self, due: DueAccess, deadline: float) -> AccessRecord:
        """Create or remove the login, and return the record of the outcome. Calls to CSP end by `deadline` on the
        loop's clock, because the claim ends soon after.

        If this process dies meanwhile, the claim ends, and the next attempt repeats the steps.
        """
        with (
            log_context.bound(sandbox_id=due.sandbox_id),
            tracing.root_span("remove login" if due.remove else "create login"),
        ):
            record = await (self._remove(due, deadline) if due.remove else self._create(due, deadline))
            return record.model_copy(update={"traceparent": tracing.traceparent()})

    async def _create(self, due: DueAccess, deadline: float) -> AccessRecord:
        try:
            password = self._keys.decrypt(due.password or "")
            user_id = await self._create_user(due, password, deadline)
        except UnknownKey:
            return _build_failure(due, KEY_UNKNOWN, "key", failed=True, retry_in_sec=LATE_RETRY_SEC)
        except CspError as error:
            return self._handle_failure(due, error)
        self._circuit.record_success(_now())
        metrics.LOGINS_CREATED.inc()
        log.info("csp.user_created", user_id=user_id)
        return RecordAccess(sandbox_id=due.sandbox_id, claim_id=due.claim_id, user_id=user_id)

    async def _create_user(self, due: DueAccess, password: str, deadline: float) -> str:
        """Return the id of the user, which has the password then. An expired session is replaced once."""
        try:
            return await self._create_user_in_session(due, password, deadline)
        except SessionExpired:
            return await self._create_user_in_session(due, password, deadline)

    async def _create_user_in_session(self, due: DueAccess, password: str, deadline: float) -> str:
        async with self._sessions.in_account(due.external_id, deadline) as jwt:
            groups = await self._users.list_groups(jwt, deadline)
            if missing := [name for name in due.groups if name not in groups]:
                known = ", ".join(sorted(groups)) or "none"
                raise CspRefused(f"The account has no group {', '.join(missing)}. Its groups are: {known}.")
            user_id = await self._users.create_user(
                jwt,
                email=due.email,
                name=due.email.partition("@")[0],
                group_ids=[groups[name] for name in due.groups],
                deadline=deadline,
            )
            if user_id is None:
                user_id = await self._users.find_user(jwt, due.email, deadline)
            if user_id is None:
                raise CspRefused("CSP says that the user exists, but the account does not list it.")
            await self._users.set_password(jwt, user_id, password, deadline)
            return user_id

    async def _remove(self, due: DueAccess, deadline: float) -> AccessRecord:
        try:
            try:
                await self._delete_user(due, deadline)
            except SessionExpired:
                await self._delete_user(due, deadline)
        except CspError as error:
            return self._handle_failure(due, error)
        self._circuit.record_success(_now())
        metrics.LOGINS_REMOVED.inc()
        log.info("csp.user_removed")
        return RecordAccessRemoval(sandbox_id=due.sandbox_id, claim_id=due.claim_id)

    async def _delete_user(self, due: DueAccess, deadline: float) -> None:
        async with self._sessions.in_account(due.external_id, deadline) as jwt:
            # The id is unknown if the attempt that created the user died before its record.
            user_id = due.user_id or await self._users.find_user(jwt, due.email, deadline)
            if user_id is not None:
                await self._users.delete_user(jwt, user_id, deadline)

    def _handle_failure(self, due: DueAccess, error: CspError) -> RecordAccessFailure:
        if isinstance(error, CspUnauthorized):
            pause_sec = self._settings.circuit_breaker_timeout_sec
            return _build_failure(due, SIGN_IN_REFUSED, "sign_in", failed=True, retry_in_sec=pause_sec)
        is_late = due.waiting_sec > self._settings.access_timeout_sec
        retry_sec = LATE_RETRY_SEC if is_late else RETRY_SEC
        if isinstance(error, CspRefused):
            self._circuit.record_success(_now())  # CSP works
            return _build_failure(due, str(error), "refused", failed=True, retry_in_sec=LATE_RETRY_SEC)
        if isinstance(error, SwitchRefused):
            reason = f"CSP has not let the broker into the account for {due.waiting_sec:.0f} s: {error}"
            retry_sec = max(retry_sec, error.retry_after or 0)
            return _build_failure(due, reason, "not_ready", failed=is_late, retry_in_sec=retry_sec)
        self._circuit.record_failure(_now())
        retry_after_sec = error.retry_after if isinstance(error, CspUnavailable) else None
        retry_sec = max(retry_sec, retry_after_sec or 0)
        return _build_failure(due, str(error), "unavailable", failed=is_late, retry_in_sec=retry_sec)


def _build_failure(
    due: DueAccess, error: str, reason: str, *, failed: bool, retry_in_sec: float
) -> RecordAccessFailure:
    metrics.LOGIN_FAILURES.labels(reason).inc()
    log.info("csp.login_failed", error=error, reason=reason, remove=due.remove)
    return RecordAccessFailure(
        sandbox_id=due.sandbox_id,
        claim_id=due.claim_id,
        error=error[:MAX_ERROR_LENGTH],
        # A fifth of it is random, because logins that failed together would fail together again.
        retry_in_sec=retry_in_sec * random.uniform(0.8, 1),  # noqa: S311 (jitter)
        failed=failed and not due.remove,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
