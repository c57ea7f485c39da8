"""Signed webhooks of Instruqt, as its sender Svix sends them."""

import json
import uuid
from datetime import UTC, datetime

from standardwebhooks import Webhook

SECRET = "whsec_dGVzdC1zZWNyZXQtb2YtaW5zdHJ1cXQtZXZlbnRz"
END_OF_PLAY = "track.completed"


def sign_event(participant: str, *, ended_at: float, kind: str = END_OF_PLAY) -> tuple[dict[str, str], bytes]:
    """Return the headers and the body of a webhook about a play that ended at `ended_at` (Unix seconds)."""
    time = datetime.fromtimestamp(ended_at, UTC).isoformat()
    body = json.dumps({"type": kind, "participant_id": participant, "timestamp": time}).encode()
    event_id, sent_at = f"msg_{uuid.uuid4().hex}", datetime.now(UTC)
    signature = Webhook(SECRET).sign(event_id, sent_at, body.decode())
    return {
        "svix-id": event_id,
        "svix-timestamp": str(int(sent_at.timestamp())),
        "svix-signature": signature,
        "Content-Type": "application/json",
    }, body
