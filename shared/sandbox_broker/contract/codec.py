"""Encoding of commands and replies in envelopes.

An envelope carries all commands that collected while the previous one was published. Its one reply message carries
a reply for each command, in the same order.
"""

from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Reply

MAX_ENVELOPE = 200
"""Commands in one envelope at most: what one SQL statement takes comfortably."""


class Envelope(BaseModel):
    model_config = ConfigDict(frozen=True)

    commands: tuple[Command, ...] = Field(min_length=1, max_length=MAX_ENVELOPE)


class ReplyEnvelope(BaseModel):
    model_config = ConfigDict(frozen=True)

    replies: tuple[Reply, ...]


class _LooseEnvelope(BaseModel):
    commands: list[Any] = Field(min_length=1, max_length=MAX_ENVELOPE)


_command: TypeAdapter[Command] = TypeAdapter(Command)


class InvalidEnvelope(ValueError):
    """The body is no envelope at all."""


class InvalidCommand(ValueError):
    """One entry of an envelope that cannot be understood; its neighbours can."""

    def __init__(self, raw: Any, reason: str) -> None:
        super().__init__(reason)
        self.raw = raw


def encode_commands(commands: Sequence[Command]) -> bytes:
    return Envelope(commands=tuple(commands)).model_dump_json(exclude_none=True).encode()


def request_ids_in(body: bytes) -> list[str]:
    """Those of the requests that an envelope is sent for, as far as it can be understood."""
    try:
        envelope = orjson.loads(body)
    except orjson.JSONDecodeError:
        return []
    commands = envelope.get("commands") if isinstance(envelope, dict) else None
    if not isinstance(commands, list):
        return []
    found = (entry.get("request_id") for entry in commands if isinstance(entry, dict))
    return [request_id for request_id in found if isinstance(request_id, str)]


def decode_commands(body: bytes) -> list[Command | InvalidCommand]:
    """The commands of an envelope, each poisonous entry in its place as an InvalidCommand.

    Raises InvalidEnvelope when there is no list of commands to speak of.
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
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]
