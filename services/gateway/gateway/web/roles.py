"""Roles of the admin routes.

A route that reads needs the role `viewer`, any other route the role `operator`, and the routes below another one.
So a new route is never open to a role by mistake.
"""

from collections.abc import Mapping

from sandbox_broker.contract.tokens import Role

RANKS: Mapping[Role, int] = {"track": 0, "viewer": 1, "operator": 2, "admin": 3}
"""A role may use the routes of all lower roles, except that `viewer` and `operator` may not use track routes."""

TRACK_ROLES: frozenset[Role] = frozenset({"track", "admin"})
"""Roles that may use the routes for students."""

_EXCEPTIONS: Mapping[tuple[str, str], Role] = {
    ("GET", "/v1/admin/audit"): "operator",
    ("GET", "/v1/admin/tokens"): "admin",
    ("POST", "/v1/admin/tokens"): "admin",
    ("DELETE", "/v1/admin/tokens/{name}"): "admin",
    ("POST", "/v1/admin/tokens/{name}/suspend"): "admin",
    ("POST", "/v1/admin/tokens/{name}/resume"): "admin",
    ("POST", "/v1/admin/forget"): "admin",
    ("PUT", "/v1/admin/policies"): "admin",
}


def required_role(method: str, path: str) -> Role:
    """Return the lowest role that may use the admin route. `path` is the template of the route."""
    return _EXCEPTIONS.get((method, path)) or ("viewer" if method == "GET" else "operator")


def is_permitted(role: Role, required: Role) -> bool:
    return RANKS[role] >= RANKS[required]
