"""Signatures of webhooks: the test vectors of Standard Webhooks, rotation, replay window, malformed headers."""

import base64
import hashlib
import hmac
import time
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr
from standardwebhooks import webhooks

from gateway.web.webhook_signature import InvalidSignature, WebhookVerifier, check_secrets

# Vector of the specification's reference library.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'
SENT_AT = 1614265330
VECTOR = {
    b"webhook-id": b"msg_p5jXN8AQM9LWM0D4loKWxJek",
    b"webhook-timestamp": b"1614265330",
    b"webhook-signature": b"v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}
OTHER_SECRET = "whsec_" + base64.b64encode(bytes(24)).decode()
WINDOW_SEC = 5 * 60


def sign(
    body: bytes, *, sent_at: float | None = None, secret: str = SECRET, prefix: str = "webhook"
) -> dict[str, str]:
    """Return the headers of a webhook, signed as the specification describes it."""
    timestamp = str(int(time.time() if sent_at is None else sent_at))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.digest(key, b".".join((b"msg_1", timestamp.encode(), body)), hashlib.sha256)
    return {
        f"{prefix}-id": "msg_1",
        f"{prefix}-timestamp": timestamp,
        f"{prefix}-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def fields(headers: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in headers.items()}


@pytest.fixture
def verifier() -> WebhookVerifier:
    return WebhookVerifier(SecretStr(SECRET))


@pytest.fixture
def time_of_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":  # noqa: ARG003 (signature of datetime)
            return cls.fromtimestamp(SENT_AT + 60, tz=UTC)

    monkeypatch.setattr(webhooks, "datetime", Clock)


@pytest.mark.usefixtures("time_of_vector")
@pytest.mark.parametrize("prefix", [b"webhook-", b"svix-"])
def test_the_vector_of_the_specification_is_valid(verifier: WebhookVerifier, prefix: bytes) -> None:
    headers = {name.replace(b"webhook-", prefix): value for name, value in VECTOR.items()}
    assert verifier.verify(headers, BODY) == SENT_AT


@pytest.mark.usefixtures("time_of_vector")
@pytest.mark.parametrize(
    ("changes", "body"),
    [
        ({}, BODY + b" "),
        ({}, b"\xff"),
        ({b"webhook-id": b"msg_p5jXN8AQM9LWM0D4loKWxJel"}, BODY),
        ({b"webhook-timestamp": b"1614265331"}, BODY),
        ({b"webhook-timestamp": b"now"}, BODY),
        ({b"webhook-timestamp": b"nan"}, BODY),
        ({b"webhook-signature": b"v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OA="}, BODY),
        ({b"webhook-signature": b"v1a,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}, BODY),
        ({b"webhook-signature": b"g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}, BODY),
        ({b"webhook-signature": b"v1,\xe9"}, BODY),
        ({b"webhook-signature": b""}, BODY),
        ({b"webhook-id": b""}, BODY),
    ],
)
def test_any_change_makes_a_signature_invalid(
    verifier: WebhookVerifier, changes: dict[bytes, bytes], body: bytes
) -> None:
    with pytest.raises(InvalidSignature) as caught:
        verifier.verify({**VECTOR, **changes}, body)
    assert SECRET.removeprefix("whsec_") not in str(caught.value)


@pytest.mark.parametrize("missing", sorted(VECTOR))
def test_a_missing_header_is_invalid(verifier: WebhookVerifier, missing: bytes) -> None:
    headers = fields(sign(BODY))
    del headers[missing]
    with pytest.raises(InvalidSignature):
        verifier.verify(headers, BODY)


def test_each_listed_secret_is_valid_during_a_rotation() -> None:
    verifier = WebhookVerifier(SecretStr(f" {OTHER_SECRET} ,{SECRET}"))
    for secret in (SECRET, OTHER_SECRET):
        verifier.verify(fields(sign(BODY, secret=secret)), BODY)
    with pytest.raises(InvalidSignature):
        verifier.verify(fields(sign(BODY, secret="whsec_" + base64.b64encode(b"x" * 24).decode())), BODY)


def test_one_of_several_signatures_suffices(verifier: WebhookVerifier) -> None:
    headers = sign(BODY)
    other = sign(BODY, secret=OTHER_SECRET)["webhook-signature"]
    headers["webhook-signature"] = f"{other} {headers['webhook-signature']}"
    verifier.verify(fields(headers), BODY)


@pytest.mark.parametrize("offset_sec", [-WINDOW_SEC - 2, WINDOW_SEC + 60])
def test_an_attempt_outside_the_replay_window_is_invalid(verifier: WebhookVerifier, offset_sec: int) -> None:
    headers = fields(sign(BODY, sent_at=time.time() + offset_sec))
    with pytest.raises(InvalidSignature, match="timestamp"):
        verifier.verify(headers, BODY)


@pytest.mark.parametrize("listed", ["", SECRET, f"{SECRET}, {OTHER_SECRET}", SECRET.removeprefix("whsec_")])
def test_secrets_of_the_specification_are_accepted(listed: str) -> None:
    assert WebhookVerifier(check_secrets(SecretStr(listed))).is_enabled == bool(listed)


@pytest.mark.parametrize(
    "listed", ["whsec_", "whsec_c2hvcnQ=", "whsec_" + "A" * 100, "hunter2-hunter2", f"{SECRET},x"]
)
def test_other_secrets_are_refused(listed: str) -> None:
    with pytest.raises(ValueError, match="must be a comma-separated list of signing secrets"):
        check_secrets(SecretStr(listed))
