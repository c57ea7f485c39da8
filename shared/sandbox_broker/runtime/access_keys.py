"""Keys of ACCESS_KEYS, which encrypt the passwords of logins in the database and in messages.

The first key encrypts, and each key decrypts. So an operator puts a new key in front, lets `brokerctl access
rotate-keys` encrypt the stored passwords again, and then removes the old key.
"""

import hashlib

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import SecretStr

NEW_KEY_ADVICE = "make one with `openssl rand -base64 32 | tr +/ -_`"


class UnknownKey(Exception):
    """No key of ACCESS_KEYS decrypts the password."""


class AccessKeys:
    def __init__(self, listed: str) -> None:
        """`listed` is the value of ACCESS_KEYS. Raises ValueError if it is empty, or holds an invalid key."""
        keys = [part.strip() for part in listed.split(",") if part.strip()]
        if not keys:
            raise ValueError("must hold at least one key")
        try:
            self._fernet = MultiFernet([Fernet(key) for key in keys])
        except ValueError:
            raise ValueError(f"holds an invalid key; {NEW_KEY_ADVICE}") from None
        self.key_id = hashlib.sha256(keys[0].encode()).hexdigest()[:16]
        """Name of the first key. It tells nothing about the key."""

    def encrypt(self, password: str) -> str:
        return str(self._fernet.encrypt(password.encode()), "ascii")

    def decrypt(self, encrypted: str) -> str:
        """Raises UnknownKey."""
        try:
            return str(self._fernet.decrypt(encrypted.encode()), "utf-8")
        except InvalidToken:
            raise UnknownKey from None

    def rotate(self, encrypted: str) -> str:
        """Return the password encrypted with the first key. Raises UnknownKey."""
        try:
            return str(self._fernet.rotate(encrypted.encode()), "ascii")
        except InvalidToken:
            raise UnknownKey from None


def parse_access_keys(setting: SecretStr) -> AccessKeys | None:
    """Return the keys of the setting ACCESS_KEYS. None if it is empty."""
    return AccessKeys(setting.get_secret_value()) if setting.get_secret_value().strip() else None
