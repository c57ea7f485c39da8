"""Policy book: the policies of the database in memory, and the terms that they give to a request.

Requests of students look terms up here instead of in the database. Each statement that grants leases names the
version of the book. PostgreSQL refuses it if an administrator has applied other policies since
(`write_session.PoliciesChanged`). Then the book is loaded again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import asyncpg
import orjson

from allocator import token_book
from allocator.settings import Settings
from allocator.token_book import TokenBook
from sandbox_broker.contract.policies import MatchKind, Policy

NOT_LOADED: Final = -1

LOAD = f"""
SELECT version, (SELECT coalesce(jsonb_agg(document), '[]') FROM policies) AS documents,
    ({token_book.LOAD}) AS tokens
FROM policy_set
"""  # noqa: S608 (both parts are constants)


class Terms(NamedTuple):
    """Terms of a lease. It keeps those under which it was granted. Times are in seconds."""

    policy: str | None
    """None: the defaults of the settings."""
    lease_sec: int
    max_extension_sec: int
    """Limit of all extensions together."""
    standby_sec: int
    """Time until the claim of a standby lease."""
    max_replacements: int
    wait_sec: int
    """Longest wait in the waiting line."""
    max_active: int | None
    """Limit of the active leases of the policy. None: no limit."""
    access_groups: tuple[str, ...] | None
    """Groups of the login inside the sandbox. None: no login."""


def default_terms(settings: Settings) -> Terms:
    return Terms(
        policy=None,
        lease_sec=_positive_seconds(settings.lab_duration_hours),
        max_extension_sec=_seconds(settings.max_extension_hours),
        standby_sec=_positive_seconds(settings.standby_hours),
        max_replacements=settings.max_replacements,
        wait_sec=round(settings.max_wait_minutes * 60),
        max_active=None,
        access_groups=None,
    )


def build_terms(policy: Policy, defaults: Terms) -> Terms:
    """Return the terms of a policy, with the defaults for fields without a value."""
    return Terms(
        policy=policy.name,
        lease_sec=defaults.lease_sec if policy.lease_hours is None else _positive_seconds(policy.lease_hours),
        max_extension_sec=(
            defaults.max_extension_sec
            if policy.max_extension_hours is None
            else _seconds(policy.max_extension_hours)
        ),
        standby_sec=(
            defaults.standby_sec if policy.standby_hours is None else _positive_seconds(policy.standby_hours)
        ),
        max_replacements=(
            defaults.max_replacements if policy.max_replacements is None else policy.max_replacements
        ),
        wait_sec=defaults.wait_sec if policy.wait_minutes is None else round(policy.wait_minutes * 60),
        max_active=policy.max_active,
        access_groups=None if policy.access is None else policy.access.groups,
    )


def _seconds(hours: float) -> int:
    return round(hours * 3600)


def _positive_seconds(hours: float) -> int:
    return max(1, round(hours * 3600))


@dataclass(slots=True)
class _Prefixes:
    """Terms by prefix."""

    terms: Mapping[str, Terms]
    lengths: tuple[int, ...]
    """Lengths of the prefixes, longest first."""

    def find(self, text: str) -> tuple[int, Terms] | None:
        """Return the longest matching prefix, as its length and terms."""
        for length in self.lengths:
            terms = self.terms.get(text[:length])
            if terms is not None and length <= len(text):
                return length, terms
        return None


class PolicyBook:
    def __init__(self, defaults: Terms) -> None:
        self.settings_terms = defaults
        """Terms of the settings, also for leases of earlier versions, which have none of their own."""
        self.tokens = TokenBook()
        self.forget()

    def forget(self) -> None:
        """Drop the policies and the tokens. The next statement loads them again."""
        self._fill((), version=NOT_LOADED)
        self.tokens.fill(())

    async def load(self, database: asyncpg.Connection) -> None:
        (row,) = await database.fetch(LOAD)
        self._fill(map(Policy.model_validate, orjson.loads(row["documents"])), version=row["version"])
        self.tokens.fill(orjson.loads(row["tokens"]))

    def _fill(self, policies: Iterable[Policy], *, version: int) -> None:
        self.version = version
        self._default = self.settings_terms
        by_kind: dict[MatchKind, dict[str, Terms]] = {"track_name": {}, "track_prefix": {}, "name_prefix": {}}
        for policy in policies:
            terms = build_terms(policy, self.settings_terms)
            if policy.match is not None:
                kind, text = policy.match.condition
                by_kind[kind][text] = terms
            elif not policy.is_stock_only:
                self._default = terms
        self._tracks = by_kind["track_name"]
        self._track_prefixes, self._name_prefixes = (
            _Prefixes(by_kind[kind], tuple(sorted({len(text) for text in by_kind[kind]}, reverse=True)))
            for kind in ("track_prefix", "name_prefix")
        )

    def resolve(self, *, track_name: str | None, name_prefix: str | None) -> Terms:
        """Return the terms of the policy with the longest match. Of equal lengths, the track name wins over the
        track prefix, and both win over the name prefix."""
        length, terms = -1, self._default
        if track_name is not None:
            exact = self._tracks.get(track_name)
            if exact is not None:
                length, terms = len(track_name), exact  # no track prefix is longer
            elif (found := self._track_prefixes.find(track_name)) is not None:
                length, terms = found
        if name_prefix is not None:
            found = self._name_prefixes.find(name_prefix)
            if found is not None and found[0] > length:
                terms = found[1]
        return terms
