"""The table of all errors: code, HTTP status, meaning, advice, and wording of refusals.

docs/errors.md and the OpenAPI document are generated from it. Other services refuse commands with a code and
parameters, and the table words them.

A message states the fact, then the action. An error that a retry can resolve carries `retry_after`, in the body and
in the `Retry-After` header.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sandbox_broker.contract.replies import Parameters
from sandbox_broker.observability import health


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    status: int
    """HTTP status."""
    meaning: str
    """The fact, without a full stop."""
    advice: str
    """The action for the caller."""
    retry_after: int | None = None
    """Seconds."""
    messages: Mapping[str, str] = field(default_factory=dict)
    """Templates of the message by the parameter `cause`, "" for all other cases. A missing template or parameter
    gives the meaning and the advice as the message."""

    def word(self, parameters: Parameters) -> str:
        template = self.messages.get(str(parameters.get("cause", "")), self.messages.get("", ""))
        try:
            return template.format_map(parameters) or f"{self.meaning}. {self.advice}"
        except KeyError:  # the sender of the refusal is older or newer than this gateway
            return f"{self.meaning}. {self.advice}"


RETRY_LATER = "Try again after `retry_after` seconds."
RETRY_SAFELY = "Repeat the request. The result is the same whether or not the first request was carried out."
QUEUE_DOWN = "The queue is down. Try again shortly."
NO_REPLY = {"": "The allocator did not reply in time. The request may still succeed. Repeat it to get its result."}

ERRORS: Mapping[str, ErrorSpec] = {
    "MISSING_SANDBOX_ID": ErrorSpec(
        400,
        "The X-Instruqt-Sandbox-ID header is missing or blank",
        "Send the student's own id (`INSTRUQT_PARTICIPANT_ID`) in this header.",
    ),
    "INVALID_HEADER": ErrorSpec(
        400,
        "A header is too long, contains characters outside printable ASCII, has an unknown value, or was sent more "
        "than once",
        "Correct the header named in the message. A value has at most 128 characters.",
    ),
    "INVALID_REQUEST": ErrorSpec(400, "A parameter is invalid", "Correct the parameters in `fields`."),
    "INVALID_POLICY": ErrorSpec(
        400,
        "A policy is invalid, so none was applied",
        "Correct the values in `fields`, then apply all policies again.",
    ),
    "INVALID_CURSOR": ErrorSpec(
        400,
        "The cursor is damaged, or belongs to another listing or to other filters",
        "Start again without a cursor, and keep the filters from page to page.",
    ),
    "MALFORMED_REQUEST": ErrorSpec(
        400,
        "The request is not valid HTTP/1.1, or its end is ambiguous; the gateway closes the connection",
        "Correct the client, or the proxy in front of the gateway. A retry fails in the same way.",
    ),
    "INVALID_EVENT": ErrorSpec(
        400,
        "The event is not a JSON object with a `type`",
        "Send the events of Instruqt unchanged.",
    ),
    "INVALID_SIGNATURE": ErrorSpec(
        401,
        "The webhook has no valid signature of the last five minutes",
        "Set `INSTRUQT_WEBHOOK_SECRET` to the signing secret of the endpoint in Instruqt. Check the clocks.",
        messages={
            "": "The webhook has no valid signature: {problem}. Check INSTRUQT_WEBHOOK_SECRET, and that no proxy "
            "changes the body."
        },
    ),
    "UNAUTHORIZED": ErrorSpec(
        401,
        "The token is missing or unknown",
        "Send `Authorization: Bearer <token>`. The operator issues tokens.",
        messages={
            "token_ended": "The token was revoked or suspended, or has expired. Ask the operator for a new one."
        },
    ),
    "FORBIDDEN": ErrorSpec(
        403,
        "The token is valid, but its role does not permit the route",
        "Send a token with the role that the message names.",
        messages={
            "role": "This route requires the role {required}, and the token has the role {role}. Send a token with "
            "the required role."
        },
    ),
    "FORBIDDEN_SCOPE": ErrorSpec(
        403,
        "The token is limited to labs or name prefixes, and to the leases that were made with it",
        "Send the token of the lab, with its `X-Instruqt-Track-ID` and `X-Sandbox-Name-Prefix`.",
        messages={
            "allocation": "The token does not permit a lease for this lab and name prefix, or the student holds a "
            "lease that was made with another token. Send the token of the lab, with its X-Instruqt-Track-ID and "
            "X-Sandbox-Name-Prefix.",
            "lease": "The lease was not made with this token. Send the token of its allocation.",
        },
    ),
    "NOT_SANDBOX_OWNER": ErrorSpec(
        403,
        "Another student holds or held this sandbox, or the lease has another secret",
        "Send the `X-Instruqt-Sandbox-ID` and the `X-Lease-Secret` of the allocation request.",
        messages={
            "secret": "The student's lease was made with another secret, or by another student. Send the "
            "X-Lease-Secret of its allocation, or ask the operator to release the lease.",
            "": "Sandbox '{sandbox_id}' is not leased to this student. Send the X-Instruqt-Sandbox-ID of its "
            "allocation.",
        },
    ),
    "EVENTS_NOT_CONFIGURED": ErrorSpec(
        404,
        "The broker receives no events of Instruqt, because it has no signing secret",
        "Set `INSTRUQT_WEBHOOK_SECRET`, or remove the endpoint in Instruqt.",
    ),
    "SANDBOX_NOT_FOUND": ErrorSpec(
        404,
        "The sandbox does not exist",
        "Use the `sandbox_id` from the allocation response.",
        messages={
            "": "There is no sandbox '{sandbox_id}'. Use the sandbox_id of the allocation.",
            "unknown_id": "There is no such sandbox. Use the sandbox_id of the allocation.",
            "unknown_to_admin": "There is no such sandbox. See GET /v1/admin/sandboxes.",
        },
    ),
    "JOB_NOT_FOUND": ErrorSpec(
        404, "The job does not exist", "Use the `job_id` from the response that started the job."
    ),
    "DEAD_LETTER_NOT_FOUND": ErrorSpec(
        404,
        "The dead letter does not exist: it was replayed or dropped, or the id is wrong",
        "Check the id in `GET /v1/admin/dead-letters`. A replayed or dropped dead letter needs no action.",
        messages={
            "": "There is no dead letter {dead_letter_id}. It may have been replayed or dropped.",
            "unknown_id": "There is no such dead letter. See GET /v1/admin/dead-letters.",
        },
    ),
    "ACCESS_NOT_REQUESTED": ErrorSpec(
        404,
        "The lease has no login inside its sandbox",
        "Release the sandbox, and allocate with `X-Sandbox-Access: user`, or ask for a policy with `access`.",
        messages={
            "": "The lease of sandbox '{sandbox_id}' has no login. Release it, and allocate with X-Sandbox-Access: "
            "user."
        },
    ),
    "ACCESS_ENDED": ErrorSpec(
        410,
        "The lease has ended, so its login does not exist any more",
        "Allocate again to get another sandbox with another login.",
        messages={"": "The lease of sandbox '{sandbox_id}' has ended, and its login is gone. Allocate again."},
    ),
    "STOCK_RULE_NOT_FOUND": ErrorSpec(
        404,
        "No policy has a stock rule with this name prefix",
        "Use a `name_prefix` of `GET /v1/admin/stock`.",
        messages={"": "No stock rule has the name prefix '{name_prefix}'. GET /v1/admin/stock lists the rules."},
    ),
    "TOKEN_NOT_FOUND": ErrorSpec(
        404,
        "There is no named token with this name",
        "Use a `name` of `GET /v1/admin/tokens`.",
        messages={"": "There is no token '{name}'. GET /v1/admin/tokens lists the tokens."},
    ),
    "NOT_FOUND": ErrorSpec(
        404,
        "The path does not exist",
        "Check the path. `/v1/docs` lists all paths, unless the operator disabled it.",
    ),
    "METHOD_NOT_ALLOWED": ErrorSpec(
        405, "The path does not support this method", "Use a method in the `Allow` header."
    ),
    "POOL_EXHAUSTED": ErrorSpec(
        409,
        "No sandbox is available in the pool",
        f"{RETRY_LATER} If the error persists, the operator has to add sandboxes to the pool.",
        retry_after=30,
        messages={
            "": "No available sandboxes in pool. Try again later, or ask the operator for more.",
            "name_prefix": "No available sandboxes in pool with the name prefix '{name_prefix}'. Try again later, "
            "or ask the operator for more.",
        },
    ),
    "QUOTA_EXCEEDED": ErrorSpec(
        409,
        "The policy of the lab or the token allows no more leases",
        f"{RETRY_LATER} A lease must end first, or the operator raises the limit (`brokerctl policy apply`, or "
        "another token).",
        retry_after=30,
        messages={
            "max_active": "The token '{token}' has all leases that it may have at a time (max_active). Try again "
            "later, or ask the operator.",
            "max_new_per_hour": "The token '{token}' has made all leases that it may make within an hour "
            "(max_new_per_hour). Try again later, or ask the operator.",
            "max_rate": "The token '{token}' has made all leases that it may make within a minute (max_rate). Try "
            "again later.",
            "policy": "All {max_active} leases of the policy '{policy}' are in use. Try again later, or ask the "
            "operator to raise max_active.",
        },
    ),
    "IDEMPOTENCY_KEY_CONFLICT": ErrorSpec(
        409,
        "The idempotency key belongs to the lease of another student, or to another extension",
        "Use a different key for each student and each extension.",
        messages={
            "other_extension": "This idempotency key belongs to an extension by {hours} hours. Send a new key.",
            "own_ended_lease": "This idempotency key belongs to an ended lease of this student. Send a new key, or "
            "none.",
            "other_student": "This idempotency key belongs to a lease of another student. Send a new key, or none.",
        },
    ),
    "STUDENT_HAS_LEASE": ErrorSpec(
        409,
        "The student has an active lease or waits for one, so the id is still needed",
        "Release the sandbox first, or wait for the end of the lease.",
    ),
    "TOKEN_EXISTS": ErrorSpec(
        409,
        "There is a named token with this name",
        "Choose another name, or revoke the token first.",
        messages={"": "There is a token '{name}'. Choose another name, or revoke it first."},
    ),
    "LEASE_ENDED": ErrorSpec(
        409,
        "The lease has ended, so it cannot be claimed, extended or replaced",
        "Allocate again to get another sandbox.",
        messages={"": "The lease of sandbox '{sandbox_id}' has ended. Allocate again."},
    ),
    "ACCESS_NOT_CONFIGURED": ErrorSpec(
        409,
        "The allocator has no `ACCESS_KEYS`, so it stores no passwords of logins",
        "Set `ACCESS_KEYS` for the gateway, the allocator and the provisioner.",
    ),
    "NOT_CLAIMED": ErrorSpec(
        409,
        "The lease is in standby, so its time has not started and cannot be extended",
        "Claim the lease first.",
        messages={"": "The lease of sandbox '{sandbox_id}' is in standby. Claim it first. Its time starts then."},
    ),
    "ALREADY_CLAIMED": ErrorSpec(
        409,
        "The lease is not in standby, and another student holds it than `X-New-Holder` names",
        "Send the student id of the first claim in `X-New-Holder`, or allocate for the other student.",
        messages={
            "": "The lease of sandbox '{sandbox_id}' was claimed for another student, or was never in standby. "
            "Send the X-New-Holder of the first claim, or allocate for this student."
        },
    ),
    "NEW_HOLDER_HAS_LEASE": ErrorSpec(
        409,
        "The student in `X-New-Holder` holds another sandbox",
        "Release that sandbox first, or use it and release the standby lease.",
        messages={
            "": "The student '{new_holder}' holds another sandbox. Release that sandbox first, or use it and "
            "release the standby lease."
        },
    ),
    "EXTENSION_LIMIT": ErrorSpec(
        409,
        "All extensions of the lease together would exceed the limit of its policy",
        "Ask for fewer hours, or ask an administrator for the extension.",
        messages={
            "": "The lease of sandbox '{sandbox_id}' can be extended by {left_hours} more hours. Ask for at most "
            "as many, or ask an administrator for the extension."
        },
    ),
    "REPLACEMENT_LIMIT": ErrorSpec(
        409,
        "The student has had as many replacements as the policy allows",
        "Ask an administrator to replace the sandbox.",
        messages={
            "": "The student has had all replacements that the policy allows ({max_replacements}). Ask an "
            "administrator to replace the sandbox."
        },
    ),
    "NOT_ALLOCATED": ErrorSpec(
        409,
        "The sandbox was never leased, so there is no lease to end",
        "No action is needed.",
        messages={"": "Sandbox '{sandbox_id}' is {status} and was never leased. There is no lease to end."},
    ),
    "NOT_DELETION_FAILED": ErrorSpec(
        409,
        "The status of the sandbox is not `deletion_failed`",
        "No action is needed. The reaper retries pending deletions automatically.",
        messages={
            "": "Sandbox '{sandbox_id}' is {status}. Only a deletion_failed one can be retried.",
            "on_hold": "The broken sandbox '{sandbox_id}' is on hold, so that an operator can inspect it. It is "
            "deleted after the hold. Send end_hold=true to delete it now.",
        },
    ),
    "NOT_REPLAYABLE": ErrorSpec(
        409,
        "The queue of the dead letter does not carry commands, or services repeat its commands automatically",
        "Inspect the dead letter, then drop it.",
        messages={
            "queue": "The dead letter names the queue '{queue}', which is not a queue of commands. Drop it.",
            "sender": "Only the reaper or the csp-syncer may send the commands of this dead letter. They repeat "
            "their pending work. Drop the dead letter.",
        },
    ),
    "SYNC_HELD": ErrorSpec(
        409,
        "The listing looks wrong, so the broker holds the sync and changes nothing",
        "Check `GET /v1/admin/sync`. If the listing is right, repeat the sync with `force=true`.",
        messages={
            "": "{reason}; nothing was changed. Inspect the planned changes of the held sync. If CSP is right, "
            "force the sync."
        },
    ),
    "LISTING_OUTDATED": ErrorSpec(
        409,
        "A newer sync was applied first, so this one changed nothing",
        RETRY_LATER,
        retry_after=5,
        messages={"": "A newer listing was applied, or a batch of this one is missing. Run the sync again."},
    ),
    "CORS_REFUSED": ErrorSpec(
        400,
        "A browser page of another origin sent the request, and its origin, method or header is not allowed",
        "Add the origin to `CORS_ALLOWED_ORIGINS` if its pages may call the API.",
    ),
    "PAYLOAD_TOO_LARGE": ErrorSpec(
        413, "The request body is larger than 64 KiB", "Send a smaller body. No route needs more than a few lines."
    ),
    "HEADERS_TOO_LARGE": ErrorSpec(
        431,
        "The request line and the header fields are longer than 16 KiB, or there are more than 100 fields",
        "Send fewer or shorter header fields.",
    ),
    "RATE_LIMITED": ErrorSpec(
        429,
        "Too many requests with this token for one student, or without a known token from this address",
        f"{RETRY_LATER} The current window of the rate limit ends then.",
        retry_after=300,
    ),
    "INTERNAL_ERROR": ErrorSpec(
        500,
        "The broker failed unexpectedly",
        "Try again. If the error persists, send the `request_id` to the operator.",
        retry_after=5,
        messages={
            "": "The broker failed unexpectedly. Try again. If the error persists, send this request_id to the "
            "operator.",
            "dead_letter": "The broker could not process this request. Operators find the cause among the dead "
            "letters.",
        },
    ),
    "CSP_UNAVAILABLE": ErrorSpec(
        502,
        "CSP is down or sent an unexpected response",
        RETRY_LATER,
        retry_after=60,
        messages={
            "not_listed": "CSP could not be listed, and nothing was changed: {problem}",
            "deletions_paused": "{problem}, so deletions pause. They continue automatically; the next attempt is "
            "in {pause_sec} s.",
        },
    ),
    "ALLOCATOR_UNAVAILABLE": ErrorSpec(
        503,
        "RabbitMQ or the allocator is down, or too many requests are in flight",
        f"{RETRY_LATER} No data is lost.",
        retry_after=2,
        messages={
            "database": "The allocator cannot reach its database. No data is lost. Try again in a few seconds.",
            "redelivered": "An earlier delivery of this request may have been completed, and its lease ended. "
            "Send a new request.",
            "not_published": "RabbitMQ did not accept the message: {problem}. The dead letter remains. Try again "
            "shortly.",
            "no_reply": "The allocator did not answer: {problem}",
            "cleanup_postponed": "The allocator did not answer: {problem}. Pending sandboxes are deleted later, "
            "automatically.",
            "job_not_recorded": "The allocator does not reply. Try again shortly.",
            "unreachable": "{problem} No data is lost. Try again shortly.",
            "not_running": "No allocator is running. Start it, then try again.",
            "queue_down": QUEUE_DOWN,
        },
    ),
    "DATABASE_BEHIND": ErrorSpec(
        503,
        "The database lacks the newest lease, as after the restore of an older backup, so no sandbox is leased",
        f"{RETRY_LATER} The operator follows the runbook, or runs `brokerctl restore confirm`.",
        retry_after=30,
        messages={
            "": "The broker's database was restored from an older backup, and an operator must confirm it. No "
            "sandbox is leased meanwhile. Try again later."
        },
    ),
    "SYNCER_UNAVAILABLE": ErrorSpec(
        503,
        "RabbitMQ or the csp-syncer is down",
        RETRY_LATER,
        retry_after=5,
        messages={
            "not_running": "No csp-syncer is running. Start it, then try again.",
            "queue_down": QUEUE_DOWN,
        },
    ),
    "REAPER_UNAVAILABLE": ErrorSpec(
        503,
        "RabbitMQ or the reaper is down",
        RETRY_LATER,
        retry_after=5,
        messages={
            "not_running": "No reaper is running. Start it, then try again.",
            "queue_down": QUEUE_DOWN,
        },
    ),
    "ACCESS_UNREADABLE": ErrorSpec(
        503,
        "No key in `ACCESS_KEYS` of the gateway decrypts the password of the login",
        f"{RETRY_LATER} The operator adds the missing key to `ACCESS_KEYS`.",
        retry_after=30,
    ),
    "EVENTS_UNAVAILABLE": ErrorSpec(
        503,
        "RabbitMQ does not send events to this gateway",
        RETRY_LATER,
        retry_after=5,
        messages={"": "RabbitMQ does not send events to this gateway. Try again in a few seconds."},
    ),
    "TOO_MANY_STREAMS": ErrorSpec(
        503,
        "The gateway has `MAX_EVENT_STREAMS` open event streams",
        "Close streams that are not needed, or use another gateway.",
        retry_after=30,
        messages={"": "This gateway has no free event stream. Close some, or try again later."},
    ),
    "DATABASE_UNAVAILABLE": ErrorSpec(503, "The database does not respond", RETRY_LATER, retry_after=2),
    "NOT_READY": ErrorSpec(
        503,
        "`/readyz`: this process cannot serve requests; the message gives the cause",
        "Send requests to another replica until the process is ready.",
        retry_after=health.RETRY_AFTER_SEC,
    ),
    "STOPPING": ErrorSpec(
        503,
        "The gateway is stopping and received no reply in time; the request may still succeed",
        RETRY_SAFELY,
        retry_after=1,
    ),
    "ALLOCATION_TIMEOUT": ErrorSpec(
        504,
        "The allocator did not reply in time; the request may still succeed",
        RETRY_SAFELY,
        retry_after=1,
        messages=NO_REPLY,
    ),
    "RELEASE_TIMEOUT": ErrorSpec(
        504,
        "The allocator did not reply in time; the request may still succeed",
        RETRY_SAFELY,
        retry_after=1,
        messages=NO_REPLY,
    ),
    "LEASE_CHANGE_TIMEOUT": ErrorSpec(
        504,
        "The allocator did not reply in time; the claim, extension or replacement may still succeed",
        "Repeat a claim or a replacement. Repeat an extension with the same `Idempotency-Key`.",
        retry_after=1,
        messages={
            **NO_REPLY,
            "without_key": "The allocator did not reply in time. The lease may have been extended. Check its "
            "expires_at before you repeat the request, and send an Idempotency-Key next time.",
        },
    ),
    "MAINTENANCE_TIMEOUT": ErrorSpec(
        504,
        "The allocator did not reply in time; the request may still succeed",
        "Check whether the change was made. If it was not, repeat the request: no change is made twice.",
        retry_after=5,
        messages={
            "": "The allocator did not reply in time. The action may still take effect. Check before you repeat "
            "it.",
            "more_records": "{done} records are done, and more are left. Repeat the request to continue.",
        },
    ),
}
