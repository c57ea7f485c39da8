"""Encryption of passwords with the keys of ACCESS_KEYS."""

import pytest
from cryptography.fernet import Fernet

from sandbox_broker.runtime.access_keys import AccessKeys, UnknownKey

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()
PASSWORD = "Abcdef12!?"


def test_the_first_key_encrypts_and_each_key_decrypts() -> None:
    old, both, new = AccessKeys(OLD), AccessKeys(f"{NEW}, {OLD},"), AccessKeys(NEW)
    encrypted = old.encrypt(PASSWORD)
    assert PASSWORD not in encrypted
    assert both.decrypt(encrypted) == PASSWORD
    with pytest.raises(UnknownKey):
        new.decrypt(encrypted)
    with pytest.raises(UnknownKey):
        new.rotate(encrypted)
    assert new.decrypt(both.rotate(encrypted)) == PASSWORD
    assert (both.key_id == new.key_id, both.key_id == old.key_id) == (True, False)
    assert both.key_id not in NEW


@pytest.mark.parametrize("listed", ["", " , ", "short", f"{'A' * 43}=,short", "ä" * 44])
def test_an_invalid_list_is_refused_without_its_text(listed: str) -> None:
    with pytest.raises(ValueError, match=r"must hold at least one key|holds an invalid key") as caught:
        AccessKeys(listed)
    assert "short" not in str(caught.value).replace("openssl", "")
