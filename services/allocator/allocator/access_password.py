"""Passwords of new logins."""

import secrets
import string

LENGTH = 20
SPECIAL = "!#%+-=?@_"
"""Special characters without a meaning between single quotes of a shell."""
_CLASSES = (string.ascii_uppercase, string.ascii_lowercase, string.digits, SPECIAL)
_MINIMUM = 2
"""Characters of each class. CSP wants upper and lower case, digits, and at least two special characters."""


def generate_password() -> str:
    """Return a random password by CSP's rules, of about 118 bits. It begins with a letter."""
    random = secrets.SystemRandom()
    characters = [random.choice(characters) for characters in _CLASSES for _ in range(_MINIMUM)]
    characters += [random.choice("".join(_CLASSES)) for _ in range(LENGTH - len(characters) - 1)]
    random.shuffle(characters)
    return random.choice(string.ascii_letters) + "".join(characters)
