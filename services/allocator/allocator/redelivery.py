"""Redelivery: recognises envelopes of earlier deliveries."""

from aiormq.abc import DeliveredMessage

MAX_SEEN = 20_000
"""Remembered envelopes: more than arrive while a student waits for a reply."""


class SeenEnvelopes:
    """Ids of the last MAX_SEEN envelopes.

    RabbitMQ marks its own redeliveries, but not a second copy from a client or the network. This set
    recognises such a copy, unless another allocator received the first one.
    """

    def __init__(self) -> None:
        self._keys: dict[tuple[str | None, str], None] = {}

    def is_redelivery(self, delivery: DeliveredMessage) -> bool:
        """Return whether RabbitMQ marked the delivery as redelivered, or its envelope is known."""
        properties = delivery.header.properties
        if delivery.redelivered:
            return True
        return (
            properties.correlation_id is not None and (properties.reply_to, properties.correlation_id) in self._keys
        )

    def remember(self, delivery: DeliveredMessage) -> None:
        """Add the envelope; forget the oldest one above the limit. Envelopes without an id are not remembered."""
        properties = delivery.header.properties
        if properties.correlation_id is None:
            return
        self._keys[properties.reply_to, properties.correlation_id] = None
        if len(self._keys) > MAX_SEEN:
            del self._keys[next(iter(self._keys))]
