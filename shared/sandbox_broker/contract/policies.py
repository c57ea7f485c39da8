"""Policies: rules of labs for lease times, quotas, waiting and stock.

An administrator applies all policies together. A field without a value takes the default of the settings.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError, model_validator

from sandbox_broker.contract.types import PrintableAscii, StorableText

MAX_POLICIES = 1000
MAX_HOURS = 87_600
"""Ten years."""


def _shorten(number: float) -> int | float:
    """Return 8 for 8.0, as the administrator wrote it."""
    return int(number) if number.is_integer() else number


_Fraction = Annotated[float, Field(strict=True, allow_inf_nan=False), PlainSerializer(_shorten)]
Hours = Annotated[_Fraction, Field(ge=0, le=MAX_HOURS)]
PositiveHours = Annotated[_Fraction, Field(gt=0, le=MAX_HOURS)]
Minutes = Annotated[_Fraction, Field(ge=0, le=MAX_HOURS * 60)]
Number = Annotated[int, Field(strict=True, ge=0, le=1_000_000)]

MatchKind = Literal["track_name", "track_prefix", "name_prefix"]
"""Kinds of a match. Of two matches of the same length, the kind that comes first here wins."""


class _Model(BaseModel):
    # A newer allocator may have stored fields that this version does not know. `parse_policies` refuses them.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Match(_Model):
    """Requests of a policy: those of one track, of tracks that start with a prefix, or for a name prefix."""

    track_name: PrintableAscii | None = None
    track_prefix: PrintableAscii | None = None
    name_prefix: PrintableAscii | None = None
    """Prefix of the requested sandbox names. A longer requested prefix matches, too."""

    @model_validator(mode="after")
    def _check_kind(self) -> "Match":
        if sum(value is not None for value in (self.track_name, self.track_prefix, self.name_prefix)) != 1:
            raise ValueError("needs exactly one of track_name, track_prefix and name_prefix")
        return self

    @property
    def condition(self) -> tuple[MatchKind, str]:
        """The kind of the match and its text."""
        if self.track_name is not None:
            return "track_name", self.track_name
        if self.track_prefix is not None:
            return "track_prefix", self.track_prefix
        return "name_prefix", self.name_prefix or ""


class AdminUser(_Model):
    """First user of a created account."""

    email: Annotated[StorableText, Field(min_length=3, max_length=254, pattern=r"^[^@\s]+@[^@\s]+$")]
    name: Annotated[StorableText, Field(min_length=1, max_length=128)]


class StockRule(_Model):
    """Number of sandboxes to keep in stock, by the prefix of their names."""

    name_prefix: Annotated[PrintableAscii, Field(max_length=100)]
    min: Number
    """The provisioner creates sandboxes while fewer are available."""
    max: Number
    """Limit of available, leased and future sandboxes together."""
    admin_user: AdminUser | None = None

    @model_validator(mode="after")
    def _check_rule(self) -> "StockRule":
        if self.min > self.max:
            raise ValueError("min is greater than max")
        if self.name_prefix[-1].isdigit():
            raise ValueError("name_prefix ends with a digit, but the broker appends a number; end it with -")
        return self


class Access(_Model):
    """Login for the student inside the sandbox."""

    groups: tuple[Annotated[StorableText, Field(min_length=1, max_length=128)], ...] = Field(
        min_length=1, max_length=20
    )


class Policy(_Model):
    """Rules of one lab."""

    name: PrintableAscii
    match: Match | None = None
    """None: the policy of all requests that no other policy matches."""
    lease_hours: PositiveHours | None = None
    max_extension_hours: Hours | None = None
    standby_hours: PositiveHours | None = None
    max_active: Number | None = None
    """Limit of the active leases of this policy. None: no limit."""
    wait_minutes: Minutes | None = None
    """Longest wait in the waiting line. 0: no waiting."""
    max_replacements: Number | None = None
    """Replacements per student."""
    access: Access | None = None
    stock: StockRule | None = None

    @property
    def is_stock_only(self) -> bool:
        """Whether the policy is only a stock rule. Without a match, it applies to no lease."""
        return self.stock is not None and self.to_document().keys() <= {"name", "stock"}

    def to_document(self) -> dict[str, Any]:
        """Return the fields that were set, as JSON values."""
        return self.model_dump(mode="json", exclude_none=True)


class PolicyProblem(TypedDict):
    field: str
    """Path of the value, like `policies.0.stock.min`."""
    problem: str


class InvalidPolicies(ValueError):
    """The policies break a rule. None of them may be applied."""

    def __init__(self, problems: list[PolicyProblem]) -> None:
        super().__init__("; ".join(f"{problem['field']}: {problem['problem']}" for problem in problems))
        self.problems = problems


_POLICIES: TypeAdapter[tuple[Policy, ...]] = TypeAdapter(
    Annotated[tuple[Policy, ...], Field(max_length=MAX_POLICIES)]
)


def parse_policies(raw: Any) -> tuple[Policy, ...]:
    """Return the policies of decoded JSON, a list of objects. Raises InvalidPolicies with all problems."""
    problems = [*_find_unknown_fields(raw)]
    try:
        policies = _POLICIES.validate_python(raw)
    except ValidationError as error:
        for found in error.errors(include_url=False, include_input=False, include_context=False):
            text = _TEXTS.get(found["type"]) or found["msg"].removeprefix("Value error, ").replace("Input", "value")
            problems.append(PolicyProblem(field=".".join(("policies", *map(str, found["loc"]))), problem=text))
    else:
        problems += find_conflicts(policies)
    if problems:
        raise InvalidPolicies(problems)
    return policies


def find_conflicts(policies: Sequence[Policy]) -> Iterator[PolicyProblem]:
    """Yield a problem for each policy that cannot stand beside an earlier one."""
    names: dict[str, int] = {}
    matches: dict[tuple[MatchKind, str] | None, str] = {}
    stocks: dict[str, str] = {}
    for index, policy in enumerate(policies):
        first = names.setdefault(policy.name, index)
        if first != index:
            yield _conflict(index, "name", f"the name {policy.name} is used twice; give each policy its own name")
            continue
        if policy.match is not None or not policy.is_stock_only:
            condition = None if policy.match is None else policy.match.condition
            owner = matches.setdefault(condition, policy.name)
            if owner != policy.name:
                yield _conflict(
                    index,
                    "match",
                    f"the policy {owner} has no match either; only one policy may be the default"
                    if condition is None
                    else f"the policy {owner} has the same match; remove one of them",
                )
        if policy.stock is not None:
            owner = stocks.setdefault(policy.stock.name_prefix, policy.name)
            if owner != policy.name:
                yield _conflict(
                    index,
                    "stock.name_prefix",
                    f"the policy {owner} has a stock rule for this prefix; remove one of them",
                )


def _conflict(index: int, field: str, problem: str) -> PolicyProblem:
    return PolicyProblem(field=f"policies.{index}.{field}", problem=problem)


_TEXTS: Mapping[str, str] = {
    "missing": "is missing",
    "model_type": "must have fields, like name: value",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
}
"""Problems by the types of pydantic whose own texts name types of Python."""

_NESTED: Mapping[str, type[_Model]] = {
    "match": Match,
    "access": Access,
    "stock": StockRule,
    "admin_user": AdminUser,
}


def _find_unknown_fields(raw: Any) -> Iterator[PolicyProblem]:
    if isinstance(raw, list | tuple):
        for index, policy in enumerate(raw):
            yield from _find_unknown_in(policy, Policy, f"policies.{index}")


def _find_unknown_in(raw: Any, model: type[_Model], path: str) -> Iterator[PolicyProblem]:
    if not isinstance(raw, Mapping):
        return
    for key, value in raw.items():
        if key not in model.model_fields:
            known = ", ".join(model.model_fields)
            yield PolicyProblem(field=f"{path}.{key}", problem=f"unknown field; the fields are {known}")
        elif key in _NESTED:
            yield from _find_unknown_in(value, _NESTED[key], f"{path}.{key}")
