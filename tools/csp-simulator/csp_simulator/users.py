"""Users inside the accounts, as an administrator of an account creates them."""

import json
import re
import uuid
from dataclasses import asdict, dataclass, replace
from typing import Any

GROUP_NAMES = ("user", "act_admin")
MIN_SPECIAL_CHARACTERS = 2


@dataclass(frozen=True, slots=True)
class User:
    id: str
    account: str  # external id, lower case
    email: str
    name: str
    type: str
    group_ids: tuple[str, ...]
    password: str | None = None

    def to_record(self) -> dict[str, Any]:
        """Return the record as CSP lists it. It has no password."""
        return {"id": self.id, "email": self.email, "name": self.name, "type": self.type, "groups": self.groups}

    @property
    def groups(self) -> list[str]:
        """Names of the groups."""
        return [name for name in GROUP_NAMES if build_group_id(self.account, name) in self.group_ids]


class UserStore:
    """Users by account. A user outlives its account, as in CSP."""

    def __init__(self) -> None:
        self._users: dict[str, User] = {}

    def create_user(self, account: str, email: str, name: str, kind: str, group_ids: list[str]) -> User | None:
        """Create a user without a password. Return None if the account has a user with this email."""
        if self.find_users(account, email):
            return None
        user = User(str(uuid.uuid4()), account, email, name, kind, tuple(group_ids))
        self._users[user.id] = user
        return user

    def find_users(self, account: str, email: str) -> list[User]:
        return [user for user in self._users.values() if (user.account, user.email) == (account, email)]

    def set_password(self, account: str, user_id: str, password: str) -> bool:
        """Return False if the account has no such user."""
        if (user := self._find(account, user_id)) is None:
            return False
        self._users[user_id] = replace(user, password=password)
        return True

    def delete_user(self, account: str, user_id: str) -> bool:
        """Return False if the account has no such user."""
        if self._find(account, user_id) is None:
            return False
        del self._users[user_id]
        return True

    def sign_in(self, email: object, password: object) -> User | None:
        """Return the user with these credentials."""
        for user in self._users.values():
            if user.password is not None and (user.email, user.password) == (email, password):
                return user
        return None

    def find_user(self, user_id: str | None) -> User | None:
        return self._users.get(user_id or "")

    def clear(self) -> None:
        self._users.clear()

    def dump_records(self) -> bytes:
        """Return all users as the JSON body of the control API, with `has_password` in place of the password."""
        records = [
            {**asdict(user), "groups": user.groups, "has_password": user.password is not None}
            for user in self._users.values()
        ]
        for record in records:
            del record["password"]
        return json.dumps({"users": records}).encode()

    def _find(self, account: str, user_id: str) -> User | None:
        user = self._users.get(user_id)
        return user if user is not None and user.account == account else None


def list_groups(account: str) -> list[dict[str, str]]:
    return [{"id": build_group_id(account, name), "name": name} for name in GROUP_NAMES]


def build_group_id(account: str, name: str) -> str:
    """Return the id of a group. Each account has groups of its own."""
    return f"identity/groups/{uuid.uuid5(uuid.NAMESPACE_OID, f'{account}/{name}')}"


def find_password_problem(password: object) -> str | None:
    """Return the first rule that the password breaks."""
    if not isinstance(password, str) or len(password) < 8:
        return "the password must have at least 8 characters"
    for pattern, what in (
        ("[A-Z]", "an upper-case letter"),
        ("[a-z]", "a lower-case letter"),
        ("[0-9]", "a digit"),
    ):
        if not re.search(pattern, password):
            return f"the password must contain {what}"
    if len(re.findall("[^A-Za-z0-9]", password)) < MIN_SPECIAL_CHARACTERS:
        return f"the password must contain at least {MIN_SPECIAL_CHARACTERS} special characters"
    return None
