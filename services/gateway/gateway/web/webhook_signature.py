"""Signature check of webhooks by the Standard Webhooks specification (HMAC-SHA256, v1).

Svix, the sender of Instruqt's webhooks, signs in the same way and names its headers `svix-…`.
"""

import base64

from pydantic import SecretStr
from standardwebhooks import Webhook, WebhookVerificationError

from gateway.web.headers import Fields
from sandbox_broker.runtime.settings import split_tokens

_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
"""Length of a secret, as the specification requires."""


class InvalidSignature(Exception):
    """The request has no valid signature. The text states the reason and contains no secret."""


class WebhookVerifier:
    """Verifier with a list of secrets. A secret can thus be replaced without refused webhooks."""

    def __init__(self, secrets: SecretStr) -> None:
        self._webhooks = [Webhook(secret) for secret in split_tokens(secrets)]

    @property
    def is_enabled(self) -> bool:
        """False without secrets."""
        return bool(self._webhooks)

    def verify(self, fields: Fields, body: bytes) -> int:
        """Return the time of the sending attempt in Unix seconds. Raises InvalidSignature.

        The library accepts attempts of the last five minutes, so that a recorded request is useless later.
        """
        headers = _read_headers(fields)
        problem = "no matching signature"
        for webhook in self._webhooks:
            try:
                webhook.verify(body, headers, json_parse=False)
            except WebhookVerificationError as error:
                problem = str(error)
            except ValueError:  # malformed base64, a signature without a version, a body outside UTF-8
                problem = "the signature or the body is malformed"
            else:
                return int(float(headers["webhook-timestamp"]))
        raise InvalidSignature(problem)


def _read_headers(fields: Fields) -> dict[str, str]:
    """Return the headers of the signature under their names in the specification."""
    sender = b"svix-" if b"svix-signature" in fields and b"webhook-signature" not in fields else b"webhook-"
    return {
        f"webhook-{name}": value.decode("latin-1")
        for name in ("id", "timestamp", "signature")
        if (value := fields.get(sender + name.encode()))
    }


def check_secrets(listed: SecretStr) -> SecretStr:
    """Return the list of secrets. Raises ValueError unless each is a secret of the specification."""
    for secret in split_tokens(listed):
        try:
            key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except ValueError:
            key = b""
        if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
            raise ValueError(
                f"must be a comma-separated list of signing secrets like {_PREFIX}…, or empty; "
                "copy the secret of the endpoint from Instruqt's webhook settings"
            )
    return listed
