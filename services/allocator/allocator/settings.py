from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from sandbox_broker.contract.policies import MAX_HOURS
from sandbox_broker.runtime.settings import AccessKeyList, DatabaseSettings, Port

MIN_KEY_LENGTH = 24


def _check_pseudonym_key(value: SecretStr) -> SecretStr:
    if 0 < len(value.get_secret_value()) < MIN_KEY_LENGTH:
        raise ValueError(f"is shorter than {MIN_KEY_LENGTH} characters; make one with `openssl rand -hex 24`")
    return value


class Settings(DatabaseSettings):
    allocator_port: Port = 9101
    # Defaults of the policies.
    lab_duration_hours: float = Field(default=4, gt=0, le=MAX_HOURS)
    max_extension_hours: float = Field(default=4, ge=0, le=MAX_HOURS)
    standby_hours: float = Field(default=24, gt=0, le=MAX_HOURS)
    max_wait_minutes: float = Field(default=30, ge=0, le=MAX_HOURS * 60)
    max_replacements: int = Field(default=1, ge=0, le=1_000_000)
    waiting_ttl_sec: float = Field(default=60, ge=1, le=3600)
    """Time without a repetition of the request after which a student loses the place in the waiting line."""
    waiting_max: int = Field(default=2000, ge=0, le=100_000)
    broken_hold_hours: float = Field(default=24, ge=0, le=MAX_HOURS)
    access_keys: AccessKeyList = SecretStr("")
    pseudonym_key: Annotated[SecretStr, AfterValidator(_check_pseudonym_key)] = SecretStr("")
    """Key of the pseudonyms that replace student ids. Empty: a random key of each start."""
    invariant_check_sec: float = Field(default=60, gt=0)
