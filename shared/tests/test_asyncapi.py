"""AsyncAPI document, generated from the code."""

from collections.abc import Iterator
from typing import Any, get_args

from sandbox_broker.contract import commands, events, replies, topology
from sandbox_broker.contract.asyncapi import build_document
from sandbox_broker.contract.event_payloads import EVENT_DATA


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_all_references_resolve() -> None:
    root = build_document()
    targets = set(references(root))
    assert targets
    for reference in targets:
        node = root
        for name in reference.removeprefix("#/").split("/"):
            node = node[name]


def test_every_queue_exchange_and_binding_is_listed() -> None:
    channels = build_document()["channels"]
    assert {exchange.name for exchange in topology.EXCHANGES} <= channels.keys()
    listed = [
        (channel["address"], binding["exchange"], binding["routingKey"], binding["arguments"])
        for channel in channels.values()
        for binding in channel.get("x-bindings", [])
    ]
    assert sorted(listed, key=str) == sorted(
        (
            (binding.queue.name, binding.exchange.name, binding.routing_key, dict(binding.arguments))
            for binding in topology.BINDINGS
        ),
        key=str,
    )
    arguments = {channel["address"]: channel.get("x-arguments") for channel in channels.values()}
    assert {queue.name: dict(queue.arguments) for queue in topology.QUEUES}.items() <= arguments.items()


def test_each_exchange_lists_its_commands() -> None:
    made = build_document()
    shown = {}
    for exchange in topology.EXCHANGES:
        for reference in made["channels"][exchange.name]["messages"].values():
            message = made["components"]["messages"][reference["$ref"].rpartition("/")[2]]
            for part in message["payload"].get("allOf", []):
                if "commands" in part.get("properties", {}):
                    shown[exchange.name] = part["properties"]["commands"]["items"]["properties"]["type"]["enum"]
    assert shown == {
        exchange.name: sorted(command.__name__ for command in exchange.commands)
        for exchange in topology.EXCHANGES
        if exchange.commands
    }


def test_every_command_reply_and_event_has_a_schema() -> None:
    components = build_document()["components"]
    for union in (commands.AnyCommand, replies.Reply):
        for message in get_args(get_args(union)[0]):
            assert message.__name__ in components["schemas"]
    assert set(get_args(events.EventType)) == set(EVENT_DATA) <= components["messages"].keys()
