"""Encoding of commands and replies in envelopes.

An envelope carries the commands that gathered while the previous envelope was published. One reply message answers
it, with a reply for each command in the same order.
"""

from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from sandbox_broker.contract.commands import AnyCommand, Command
from sandbox_broker.contract.replies import Reply

MAX_ENVELOPE = 200
"""Maximum number of commands in one envelope. One SQL statement handles a batch of this size well."""


class Envelope(BaseModel):
    model_config = ConfigDict(frozen=True)

    commands: tuple[AnyCommand, ...] = Field(min_length=1, max_length=MAX_ENVELOPE)


class ReplyEnvelope(BaseModel):
    model_config = ConfigDict(frozen=True)

    replies: tuple[Reply, ...]


class _LooseEnvelope(BaseModel):
    commands: list[Any] = Field(min_length=1, max_length=MAX_ENVELOPE)


_command: TypeAdapter[AnyCommand] = TypeAdapter(AnyCommand)


class InvalidEnvelope(ValueError):
    """The body is not an envelope."""


class InvalidCommand(ValueError):
    """An undecodable entry of an envelope. The other entries are not affected."""

    def __init__(self, raw: Any, reason: str) -> None:
        super().__init__(reason)
        self.raw = raw


def encode_commands(commands: Sequence[Command]) -> bytes:
    """Return an envelope of at most MAX_ENVELOPE commands. Fields that are None are left out.

    Neither this function nor `encode_replies` validates the messages again, because models have valid fields. With
    pydantic, an envelope takes twice as long.
    """
    if not 1 <= len(commands) <= MAX_ENVELOPE:
        raise ValueError(f"{len(commands)} commands in an envelope, not 1 to {MAX_ENVELOPE}")
    return orjson.dumps({"commands": commands}, default=_present_fields)


def _present_fields(value: Any) -> Any:
    if not isinstance(value, BaseModel):
        return to_jsonable_python(value)
    fields = {name: field for name, field in vars(value).items() if field is not None}
    if (sender := fields.get("sender")) is not None:
        # Its absent fields are null. A call of this function for it takes twice as long.
        fields["sender"] = vars(sender)
    return fields


def encode_replies(replies: Sequence[Reply]) -> bytes:
    """Return the body of a reply message."""
    return orjson.dumps({"replies": replies}, default=_all_fields)


def _all_fields(value: Any) -> Any:
    # orjson knows no subclasses of UUID, such as that of asyncpg.
    return vars(value) if isinstance(value, BaseModel) else to_jsonable_python(value)


def request_ids_in(body: bytes) -> list[str]:
    """Return the `request_id` of each command in an envelope. Undecodable entries are left out."""
    try:
        envelope = orjson.loads(body)
    except orjson.JSONDecodeError:
        return []
    commands = envelope.get("commands") if isinstance(envelope, dict) else None
    if not isinstance(commands, list):
        return []
    request_ids = (entry.get("request_id") for entry in commands if isinstance(entry, dict))
    return [request_id for request_id in request_ids if isinstance(request_id, str)]


def decode_commands(body: bytes) -> list[Command | InvalidCommand]:
    """Return the commands of an envelope, in order, with an InvalidCommand for each undecodable entry.

    Raises InvalidEnvelope if the body has no list of commands.
    """
    try:
        return list(Envelope.model_validate_json(body).commands)
    except ValidationError:
        pass
    try:
        entries = _LooseEnvelope.model_validate_json(body).commands
    except ValidationError as error:
        raise InvalidEnvelope(_first_problem(error)) from error
    return [_decode_command(raw) for raw in entries]


def _decode_command(raw: Any) -> Command | InvalidCommand:
    try:
        return _command.validate_python(raw)
    except ValidationError as error:
        return InvalidCommand(raw, _first_problem(error))


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    return f"{field}: {problem['msg']}" if field else problem["msg"]
