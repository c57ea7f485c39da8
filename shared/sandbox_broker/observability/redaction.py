"""Redaction of secrets in log lines, also in lines of libraries: values of secret settings, and text that looks
like another secret."""

import json
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote

from pydantic import SecretStr
from pydantic_settings import BaseSettings

from sandbox_broker.runtime.server_urls import passwords

HIDDEN = "***"
MIN_LENGTH = 6
"""Minimum length of a secret in characters. Hiding shorter values would black out ordinary words."""

_JWT = re.compile(r"eyJ[\w-]+\.[\w.-]+")
_USER_INFO = re.compile(r"(://[^/?#\s:@\"']*):[^/?#\s\"']+@")
_CREDENTIALS = re.compile(r"\b(Bearer|Token|Basic) +[\w.~+/=-]{8,}")
_HINTS = ("eyJ", "://", "Bearer ", "Token ", "Basic ")


def secrets_of(settings: BaseSettings) -> Iterator[str]:
    """Yield the tokens and passwords of the settings, including passwords in URLs."""
    for _, value in settings:
        if isinstance(value, SecretStr):
            yield value.get_secret_value()
            yield from (part.strip() for part in value.get_secret_value().split(","))
        elif isinstance(value, str) and "://" in value:
            yield from passwords(value)


class Redaction:
    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets if len(secret) >= MIN_LENGTH for form in _forms(secret)}
        self._forms = sorted(
            forms, key=lambda form: -len(form)
        )  # longest first, because a form may contain another
        self._suspicious = [form.encode() for form in (*self._forms, *_HINTS)]

    def of_bytes(self, line: bytes) -> bytes:
        """Return the redacted line. A fast search for each form comes first, because few lines hold a secret."""
        for form in self._suspicious:
            if form in line:
                return self.of_text(line.decode()).encode()
        return line

    def of_text(self, line: str) -> str:
        for form in self._forms:
            line = line.replace(form, HIDDEN)
        line = _JWT.sub(HIDDEN, line)
        line = _USER_INFO.sub(rf"\1:{HIDDEN}@", line)
        return _CREDENTIALS.sub(rf"\1 {HIDDEN}", line)


def _forms(secret: str) -> Iterator[str]:
    """Yield the secret unchanged and as encoded in JSON, repr() and URLs."""
    yield secret
    for ascii_only in (True, False):
        yield json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
    yield repr(secret)[1:-1]
    yield json.dumps(repr(secret)[1:-1])[1:-1]
    yield quote(secret, safe="")
    yield quote(secret)
