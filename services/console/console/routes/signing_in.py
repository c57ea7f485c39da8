"""Sign-in by token or OpenID Connect, and sign-out."""

from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx2
import structlog
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.starlette_client import OAuth
from fastapi import APIRouter, Depends, Form, Request
from starlette.responses import RedirectResponse, Response

from console import metrics
from console.api_client import Api, ApiProblem
from console.rendering import render
from console.session import read_person, sign_in
from console.settings import ROLES, Role, Settings
from console.web import require_csrf

PROVIDER_UNREACHABLE = "The identity provider does not answer. Try again shortly, or sign in with a token."

_REFUSED_TOKENS = {
    401: "The token is unknown. Check it, or ask an administrator.",
    403: "This token is for tracks. Use a token with the role viewer, operator or admin.",
}

router = APIRouter()
log = structlog.get_logger()


def build_oauth(settings: Settings) -> OAuth | None:
    """Return the client of the identity provider; None if OIDC_ISSUER is not set."""
    if settings.oidc_issuer is None:
        return None
    oauth = OAuth()
    oauth.register(
        "provider",
        server_metadata_url=f"{settings.oidc_issuer.rstrip('/')}/.well-known/openid-configuration",
        client_id=settings.oidc_client_id,
        client_secret=settings.oidc_client_secret.get_secret_value(),
        client_kwargs={"scope": "openid profile email", "code_challenge_method": "S256", "trust_env": False},
    )
    return oauth


@router.get("/sign-in")
async def show_sign_in(request: Request, next: str = "/") -> Response:
    if read_person(request) is not None:
        return RedirectResponse(safe_path(next), 303)
    expired = request.state.session_expired
    return _sign_in_page(request, next, "Your session has ended. Sign in again." if expired else None)


@router.post("/sign-in")
async def sign_in_by_token(
    request: Request,
    token: Annotated[str, Form(max_length=512)] = "",
    next: Annotated[str, Form(max_length=2048)] = "/",
) -> Response:
    # No session exists yet, so the Fetch metadata of the browser takes the place of a token against forged forms.
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return _sign_in_page(request, next, "The form came from another site. Sign in here.", 403)
    token = token.strip()
    if not token.isascii() or not token.isprintable() or not token:
        return _refuse_token(request, next, "Enter the token as you received it.", 400)
    try:
        known = await Api(request.app.state.http, token).get("whoami")
    except ApiProblem as problem:
        text = _REFUSED_TOKENS.get(problem.status, problem.message)
        return _refuse_token(request, next, text, problem.status or 503)
    if known["role"] not in ROLES:
        return _refuse_token(request, next, _REFUSED_TOKENS[403], 403)
    metrics.SIGN_INS.labels("token", "accepted").inc()
    sign_in(request, name=known["name"] or "Administrator", role=known["role"], token=token)
    return RedirectResponse(safe_path(next), 303)


@router.get("/sign-in/oidc")
async def begin_oidc(request: Request, next: str = "/") -> Response:
    oauth: OAuth | None = request.app.state.oauth
    if oauth is None:
        return RedirectResponse("/sign-in", 303)
    settings: Settings = request.app.state.settings
    request.session["next"] = safe_path(next)
    try:
        redirect: Response = await oauth.provider.authorize_redirect(
            request, f"{settings.console_url}/sign-in/oidc/callback"
        )
    except (httpx2.HTTPError, ValueError):
        log.warning("oidc.unreachable", exc_info=True)
        return _sign_in_page(request, next, PROVIDER_UNREACHABLE, 503)
    return redirect


@router.get("/sign-in/oidc/callback")
async def finish_oidc(request: Request) -> Response:
    oauth: OAuth | None = request.app.state.oauth
    if oauth is None:
        return RedirectResponse("/sign-in", 303)
    settings: Settings = request.app.state.settings
    path = request.session.pop("next", "/")
    try:
        answer = await oauth.provider.authorize_access_token(request)
        claims: dict[str, Any] = answer.get("userinfo") or {}
        if settings.oidc_groups_claim not in claims:
            claims = {**claims, **await oauth.provider.userinfo(token=answer)}
    except httpx2.HTTPError:
        log.warning("oidc.unreachable", exc_info=True)
        return _sign_in_page(request, path, PROVIDER_UNREACHABLE, 503)
    except (OAuthError, ValueError) as error:  # ValueError: an invalid signature or claim of the ID token
        log.warning("oidc.refused", error=repr(error))
        metrics.SIGN_INS.labels("oidc", "refused").inc()
        return _sign_in_page(request, path, "The sign-in was not completed. Begin again.", 401)
    name = str(claims.get("email") or claims.get("preferred_username") or claims.get("sub"))
    role = find_role(claims.get(settings.oidc_groups_claim), dict(settings.oidc_roles))
    if role is None:
        metrics.SIGN_INS.labels("oidc", "refused").inc()
        text = f"{name} is in no group with a role in this console. Ask an administrator."
        return _sign_in_page(request, path, text, 403)
    metrics.SIGN_INS.labels("oidc", "accepted").inc()
    sign_in(request, name=name, role=role, token=settings.token_of_role(role))
    request.session["by_oidc"] = True
    return RedirectResponse(safe_path(path), 303)


@router.post("/sign-out", dependencies=[Depends(require_csrf)])
async def sign_out(request: Request) -> Response:
    request.session.clear()
    return RedirectResponse("/sign-in", 303)


def find_role(groups: object, roles: dict[str, Role]) -> Role | None:
    """Return the role with the most rights among the groups of a person. A single group may be plain text."""
    names = [groups] if isinstance(groups, str) else groups if isinstance(groups, list) else []
    found = [roles[name] for name in names if isinstance(name, str) and name in roles]
    return max(found, key=ROLES.index, default=None)


def safe_path(path: str) -> str:
    """Return the path if it is on this console, because a link could lead to another site after the sign-in."""
    parts = urlsplit(path)
    if (
        parts.scheme
        or parts.netloc
        or not path.startswith("/")
        or path[1:2] in ("/", "\\")
        or not path.isprintable()
    ):
        return "/"
    return path


def _refuse_token(request: Request, path: str, text: str, status: int) -> Response:
    metrics.SIGN_INS.labels("token", "refused").inc()
    return _sign_in_page(request, path, text, status)


def _sign_in_page(request: Request, path: str, problem: str | None, status: int = 200) -> Response:
    has_oidc = request.app.state.oauth is not None
    return render(request, "sign_in.html", status, problem=problem, next=safe_path(path), has_oidc=has_oidc)
