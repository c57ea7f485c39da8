"""`python -m sandbox_broker.contract.asyncapi`: print docs/asyncapi.json, generated from topology and messages.

AsyncAPI 3.0 has a channel for each address: here a queue with its arguments and bindings, or an exchange. A
subscriber to events binds its own queue to `broker.events`.
"""

import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sandbox_broker.contract import codec, commands, events, replies, topology
from sandbox_broker.contract.event_payloads import EVENT_DATA

_JSON = "application/json"
_SCHEMAS = "#/components/schemas/"
_COMMANDS: tuple[type[BaseModel], ...] = get_args(get_args(commands.AnyCommand)[0])
_COMMAND_MESSAGES: Mapping[topology.Exchange, str] = {
    topology.COMMANDS: "commands",
    topology.COMMANDS_FROM_REAPER: "commandsFromReaper",
    topology.COMMANDS_FROM_SYNCER: "commandsFromCspSyncer",
    topology.COMMANDS_FROM_PROVISIONER: "commandsFromProvisioner",
}
_EVENT_OF_KEY: Mapping[str, str] = {topology.NEWEST_LEASE.name: "sandbox.allocated"}
"""Type of the events that the outbox relay also routes by another key."""
_REPLIES: tuple[type[BaseModel], ...] = get_args(get_args(replies.Reply)[0])


def build_document() -> dict[str, Any]:
    """Return the AsyncAPI document."""
    models: list[type[BaseModel]] = [codec.Envelope, codec.ReplyEnvelope, events.Event]
    models += [*_COMMANDS, *_REPLIES, *EVENT_DATA.values()]
    unique: dict[type[BaseModel], Literal["validation"]] = dict.fromkeys(models, "validation")
    _, schemas = models_json_schema(list(unique.items()), ref_template=_SCHEMAS + "{model}")
    for envelope, entries in (("Envelope", "commands"), ("ReplyEnvelope", "replies")):
        # AsyncAPI has no `discriminator` of this form. The constant `type` of each message takes its place.
        del schemas["$defs"][envelope]["properties"][entries]["items"]["discriminator"]
    event_messages: dict[str, Any] = {name: _event(name, data) for name, data in EVENT_DATA.items()}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Sandbox Broker",
            "version": "1",
            "description": "Commands, their replies, and events, over RabbitMQ. "
            "Events arrive at least once, and in order for each sandbox. Drop an `id` seen before.",
        },
        "defaultContentType": _JSON,
        "channels": {
            **{exchange.name: _of_exchange(exchange, event_messages) for exchange in topology.EXCHANGES},
            **{f"{queue.name}.queue": _of_queue(queue) for queue in topology.QUEUES},
        },
        "operations": {
            "publishEvents": _operation("send", topology.EVENTS.name),
            "answerCommands": _operation("send", topology.REPLIES.name),
            **{f"consume-{queue.name}": _operation("receive", f"{queue.name}.queue") for queue in topology.QUEUES},
        },
        "components": {
            "schemas": schemas["$defs"],
            "messages": {
                **{name: _commands(exchange) for exchange, name in _COMMAND_MESSAGES.items()},
                "replies": _message("ReplyEnvelope", "A reply for each command, in the same order"),
                "tick": {"title": "Tick of a timer", "contentType": _JSON, "payload": {"type": "object"}},
                "deadLetter": {
                    "title": "Dead letter: the unchanged message",
                    "payload": {},
                },
                **event_messages,
            },
        },
    }


def _message(schema: str, title: str) -> dict[str, Any]:
    return {"title": title, "contentType": _JSON, "payload": {"$ref": _SCHEMAS + schema}}


def _commands(exchange: topology.Exchange) -> dict[str, Any]:
    """Return the message of an envelope, limited to the command types of the exchange."""
    types = sorted(command.__name__ for command in exchange.commands)
    entry = {"properties": {"type": {"enum": types}}}
    own = {"properties": {"commands": {"items": entry}}}
    return {
        "title": f"Commands that may be sent over {exchange.name}",
        "contentType": _JSON,
        "payload": {"allOf": [{"$ref": f"{_SCHEMAS}Envelope"}, own]},
    }


def _event(name: str, data: type[BaseModel]) -> dict[str, Any]:
    own = {"properties": {"type": {"const": name}, "data": {"$ref": _SCHEMAS + data.__name__}}}
    return {
        "title": name,
        "contentType": events.EVENT_CONTENT_TYPE,
        "payload": {"allOf": [{"$ref": f"{_SCHEMAS}Event"}, own]},
    }


def _operation(action: str, channel: str) -> dict[str, Any]:
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}}


def _messages(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/messages/{name}"} for name in names}


def _of_exchange(exchange: topology.Exchange, events: Mapping[str, Any]) -> dict[str, Any]:
    carried = {
        **{sender: (name,) for sender, name in _COMMAND_MESSAGES.items()},
        topology.EVENTS: tuple(events),
        topology.TICKS: ("tick",),
        topology.DEAD_LETTERS: ("deadLetter",),
        topology.REPLIES: ("replies",),
    }[exchange]
    return {
        "address": exchange.name,
        "messages": _messages(*carried),
        "bindings": {
            "amqp": {
                "is": "routingKey",
                "exchange": {"name": exchange.name, "type": exchange.kind, "durable": True, "autoDelete": False},
            }
        },
    }


def _of_queue(queue: topology.Queue) -> dict[str, Any]:
    bindings = [binding for binding in topology.BINDINGS if binding.queue is queue]
    carried = [
        name
        for binding in bindings
        for name in (
            [_EVENT_OF_KEY.get(binding.routing_key, binding.routing_key)]
            if binding.exchange is topology.EVENTS
            else _of_exchange(binding.exchange, {})["messages"]
        )
    ]
    return {
        "address": queue.name,
        "messages": _messages(*carried),
        "bindings": {
            "amqp": {
                "is": "queue",
                "queue": {"name": queue.name, "durable": True, "exclusive": False, "autoDelete": False},
            }
        },
        "x-arguments": dict(queue.arguments),
        "x-bindings": [
            {
                "exchange": binding.exchange.name,
                "routingKey": binding.routing_key,
                "arguments": dict(binding.arguments),
            }
            for binding in bindings
        ],
    }


if __name__ == "__main__":
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    sys.stdout.write(orjson.dumps(build_document(), option=options).decode())
