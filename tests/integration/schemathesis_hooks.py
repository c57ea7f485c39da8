"""Hooks of schemathesis for rules of the API that an OpenAPI document cannot express."""

import os
from typing import Any

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.openapi.checks import MissingHeaderNotRejected, RejectedPositiveData

from gateway.web import roles

TOKEN_RULE = "Value error, tracks, prefixes and limits need the role track"
CALLER_ROLE = os.environ.get("CALLER_ROLE")
"""Role of the only token of all requests. None: track routes and admin routes get a token of the settings each."""
REFUSED_EARLIER = frozenset({401, 404, 405, 413, 431})
"""Refusals that do not depend on the role: of requests without a token, for another path, or too long."""
NEW_HEADER, OLD_HEADER = "X-Instruqt-Sandbox-ID", "X-Track-ID"


@schemathesis.hook
def filter_failure(_: Any, failure: Exception, case: Any, response: Any) -> bool:
    """Return False for correct responses that schemathesis reports as failures.

    - The student id is required. The gateway reads the old header if the new one is missing, but the document
      requires the new one.
    - A cursor is valid only if an earlier response contained it.
    - Policies have rules between each other, and so have the fields of a token. Their document has them in words.
    - The login of an ended lease is gone (410).
    - Invalid values that are too long for a request line are refused with 431, which schemathesis does not count as
      a refusal of the values.
    """
    if isinstance(failure, AcceptedNegativeData) and response.status_code == 431:
        return False
    if isinstance(failure, AcceptedNegativeData | MissingHeaderNotRejected):
        return OLD_HEADER not in case.headers or NEW_HEADER in case.headers
    if isinstance(failure, RejectedPositiveData):
        detail = response.json()["detail"]
        if detail["code"] in ("INVALID_CURSOR", "INVALID_POLICY", "ACCESS_ENDED"):
            return False
        return bool(detail.get("fields") != [{"field": "body", "problem": TOKEN_RULE}])
    return True


@schemathesis.check
def roles_are_kept(_: Any, response: Any, case: Any) -> None:
    """Require 403 for a route that the role may not use, and no refusal of the role for other routes."""
    path, method = case.operation.path, case.operation.method.upper()
    if CALLER_ROLE is None or case.method.upper() != method or response.status_code in REFUSED_EARLIER:
        return
    if path.startswith("/v1/admin/"):
        is_permitted = roles.is_permitted(CALLER_ROLE, roles.required_role(method, path))  # type: ignore[arg-type]
    elif response.request.headers.get("Authorization") and path != "/v1/instruqt/events":
        is_permitted = CALLER_ROLE in roles.TRACK_ROLES
    else:
        return
    is_refused = response.status_code == 403 and response.json()["detail"]["code"] == "FORBIDDEN"
    if is_refused == is_permitted:
        raise AssertionError(f"{response.status_code} for {method} {path} with a token of the role {CALLER_ROLE}")
