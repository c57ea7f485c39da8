"""Actions: a page that names the consequence and asks for a reason, and the request to the gateway.

The page is a form of its own, so that actions work without JavaScript. With it, the form opens in a dialog.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from starlette.responses import RedirectResponse, Response

from console.api_client import ApiProblem, quote_segment
from console.rendering import render
from console.routes.signing_in import safe_path
from console.session import Person
from console.settings import Role
from console.web import AdminApi, SignedIn, require_csrf, require_role

MAX_REASON = 400
"""Characters. The gateway accepts 500, and the name of a person from OpenID Connect is added."""
REASON_PROBLEM = f"Write a reason of at most {MAX_REASON} characters. It appears in the audit."

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Action:
    """An action on an object, or on the whole broker."""

    name: str
    title: str
    consequence: str
    """Sentence with {id} and the fields that `describe` returns."""
    button: str
    method: str
    path: str
    """Path of the admin API with {id}."""
    done: Callable[[Any], str]
    back: str
    """Page after the action, with {id}."""
    role: Role = "operator"
    is_destructive: bool = True
    parameters: tuple[tuple[str, Any], ...] = ()
    id_parameter: str | None = None
    """Query parameter for the object, if the path has no `{id}`."""
    asks_hours: bool = False
    subject: str | None = None
    """Path of the admin API that describes the object."""


ACTIONS: dict[tuple[str, str], Action] = {
    ("sandboxes", "release"): Action(
        "release",
        "End the lease",
        "This ends the lab of student {holder} now. Sandbox {name} is deleted in CSP and never returns.",
        "End the lease",
        "POST",
        "sandboxes/{id}/release",
        lambda _: "The lease has ended. The sandbox will be deleted.",
        "/sandboxes/{id}",
        subject="sandboxes/{id}",
    ),
    ("sandboxes", "extend"): Action(
        "extend",
        "Extend the lease",
        "Student {holder} keeps sandbox {name} longer. The limit of the policy does not apply.",
        "Extend the lease",
        "POST",
        "sandboxes/{id}/extend",
        lambda _: "The lease is extended.",
        "/sandboxes/{id}",
        is_destructive=False,
        asks_hours=True,
        subject="sandboxes/{id}",
    ),
    ("sandboxes", "replace"): Action(
        "replace",
        "Replace the sandbox",
        "Student {holder} gets another sandbox instead of {name} at once. Work in {name} is lost to the student. "
        "The broken sandbox is kept for a day, so that an operator can look at it.",
        "Replace the sandbox",
        "POST",
        "sandboxes/{id}/replace",
        lambda lease: f"The student has sandbox {lease['name']} now. The script finds it when it asks again.",
        "/sandboxes/{id}",
        subject="sandboxes/{id}",
    ),
    ("sandboxes", "retry-deletion"): Action(
        "retry-deletion",
        "Retry the deletion",
        "The reaper tries again to delete the account of {name} in CSP. The count of attempts restarts.",
        "Retry the deletion",
        "POST",
        "sandboxes/{id}/retry-deletion",
        lambda _: "The reaper tries the deletion again.",
        "/deletions",
        is_destructive=False,
        subject="sandboxes/{id}",
    ),
    ("dead-letters", "replay"): Action(
        "replay",
        "Replay the message",
        "The message returns to the queue {queue}. Completed commands do not take effect twice.",
        "Replay the message",
        "POST",
        "dead-letters/{id}/replay",
        lambda reply: (
            f"The message is back in {reply['queue']}."
            if reply["published"]
            else "No command was left to replay. The dead letter is removed."
        ),
        "/dead-letters",
        is_destructive=False,
        subject="dead-letters/{id}",
    ),
    ("dead-letters", "drop"): Action(
        "drop",
        "Drop the message",
        "The record of the message from {queue} is removed. Its commands never take effect.",
        "Drop the message",
        "DELETE",
        "dead-letters/{id}",
        lambda _: "The dead letter is removed.",
        "/dead-letters",
        subject="dead-letters/{id}",
    ),
    ("tokens", "suspend"): Action(
        "suspend",
        "Suspend the token",
        "All gateways refuse token {id} within 5 s. Its leases stay. An administrator can resume it.",
        "Suspend the token",
        "POST",
        "tokens/{id}/suspend",
        lambda _: "The token is suspended.",
        "/tokens",
        role="admin",
    ),
    ("tokens", "resume"): Action(
        "resume",
        "Resume the token",
        "The gateways accept token {id} again.",
        "Resume the token",
        "POST",
        "tokens/{id}/resume",
        lambda _: "The token works again.",
        "/tokens",
        role="admin",
        is_destructive=False,
    ),
    ("tokens", "revoke"): Action(
        "revoke",
        "Revoke the token",
        "All gateways refuse token {id} within 5 s and for ever. Its leases stay.",
        "Revoke the token",
        "DELETE",
        "tokens/{id}",
        lambda _: "The token is revoked.",
        "/tokens",
        role="admin",
    ),
    ("stock", "resume"): Action(
        "resume",
        "Resume the stock",
        "The provisioner creates accounts in CSP for {id} again. Without a repair of the cause it stops again.",
        "Resume the stock",
        "POST",
        "stock/resume",
        lambda reply: (
            "The stock is resumed. The provisioner creates accounts within a minute."
            if reply["changed"]
            else "The stock was not stopped."
        ),
        "/policies",
        is_destructive=False,
        id_parameter="name_prefix",
    ),
    ("sync", "run"): Action(
        "run",
        "Sync with CSP now",
        "The broker fetches the accounts from CSP and brings the pool in line. A listing that would change too "
        "much is held.",
        "Sync now",
        "POST",
        "sync",
        lambda reply: _job_text(reply, "The sync is complete."),
        "/sync",
        is_destructive=False,
    ),
    ("sync", "approve"): Action(
        "approve",
        "Approve the held sync",
        "The broker fetches a new listing from CSP and applies all its changes, even if they empty the pool. "
        "Available sandboxes that CSP does not list become stale.",
        "Approve and apply",
        "POST",
        "sync",
        lambda reply: _job_text(reply, "The listing is applied."),
        "/sync",
        parameters=(("force", "true"),),
    ),
    ("deletions", "clean-up"): Action(
        "clean-up",
        "Delete all pending sandboxes now",
        "The reaper deletes every pending sandbox in CSP now, without waiting for the backoff after failures.",
        "Delete now",
        "POST",
        "cleanup",
        lambda reply: _job_text(reply, "The clean-up is complete."),
        "/deletions",
        is_destructive=False,
    ),
}


def _job_text(reply: dict[str, Any], text: str) -> str:
    running = reply.get("status") == "running"
    return "The broker is working on it. The page shows the result when it is done." if running else text


@router.get("/actions/{area}/{name}")
async def show_action(
    request: Request,
    api: AdminApi,
    person: SignedIn,
    *,
    area: str,
    name: str,
    id: str = "",
) -> Response:
    action = _find(area, name)
    if action is None:
        return render(
            request, "error.html", 404, title="There is no such action", text="Use the buttons of a page."
        )
    require_role(person, action.role)
    fields = await api.get(action.subject.format(id=quote_segment(id))) if action.subject else {}
    return _action_page(request, area, action, id, fields)


@router.post("/actions/{area}/{name}", dependencies=[Depends(require_csrf)])
async def perform_action(
    request: Request,
    api: AdminApi,
    person: SignedIn,
    area: str,
    name: str,
    *,
    id: Annotated[str, Form()] = "",
    reason: Annotated[str, Form()] = "",
    hours: Annotated[str, Form()] = "",
    back: Annotated[str, Form()] = "",
) -> Response:
    action = _find(area, name)
    if action is None:
        return render(
            request, "error.html", 404, title="There is no such action", text="Use the buttons of a page."
        )
    require_role(person, action.role)
    fields = await api.get(action.subject.format(id=quote_segment(id))) if action.subject else {}
    reason = " ".join(reason.split())
    if not is_reason(reason):
        return _action_page(request, area, action, id, fields, problem=REASON_PROBLEM, reason=reason, status=400)
    parameters = dict(action.parameters)
    if action.id_parameter is not None:
        parameters[action.id_parameter] = id
    if action.asks_hours:
        if not hours.isascii() or not hours.isdigit() or not 1 <= int(hours) <= 168:
            problem = "Write the hours as a whole number from 1 to 168."
            return _action_page(request, area, action, id, fields, problem=problem, reason=reason, status=400)
        parameters["hours"] = hours
    parameters["reason"] = sign_reason(request, person, reason)
    try:
        reply = await api.act(action.method, action.path.format(id=quote_segment(id)), **parameters)
    except ApiProblem as problem:
        return _action_page(
            request, area, action, id, fields, problem=problem.message, reason=reason, status=problem.status or 503
        )
    request.session["flash"] = action.done(reply)
    return RedirectResponse(safe_path(back or action.back.format(id=quote_segment(id))), 303)


def is_reason(text: str) -> bool:
    return bool(text) and len(text) <= MAX_REASON


def sign_reason(request: Request, person: Person, reason: str) -> str:
    """Add the person from the identity provider, because the gateway knows only the token of the role."""
    return f"{reason} ({person.name})" if request.session.get("by_oidc") else reason


def _find(area: str, name: str) -> Action | None:
    return ACTIONS.get((area, name))


def _action_page(
    request: Request,
    area: str,
    action: Action,
    id: str,
    fields: dict[str, Any],
    *,
    problem: str | None = None,
    reason: str = "",
    status: int = 200,
) -> Response:
    words = {
        "id": id,
        "holder": fields.get("holder") or "",
        "name": fields.get("name") or id,
        "queue": fields.get("queue"),
    }
    return render(
        request,
        "action.html",
        status,
        area=area,
        action=action,
        id=id,
        consequence=action.consequence.format_map(words),
        problem=problem,
        reason=reason,
        back=action.back.format(id=quote_segment(id)),
    )
