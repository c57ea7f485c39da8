"""Session cookies: encrypted, limited in time, with secrets that can be rotated."""

import time

import pytest

from console.session import SessionCookies

SESSION = {"token": "secret-token", "role": "viewer", "began_at": int(time.time())}


def cookies(*secrets: str, hours: float = 8, secure: bool = False) -> SessionCookies:
    return SessionCookies(secrets or ("first-secret-1",), hours=hours, secure=secure)


def test_a_cookie_holds_the_session_and_shows_no_token() -> None:
    cookie = cookies().render(SESSION)
    assert "secret-token" not in cookie
    assert "; HttpOnly; SameSite=Lax" in cookie
    assert "Secure" not in cookie
    assert cookies().read(cookie.split(";")[0]) == (SESSION, False)


def test_a_cookie_behind_tls_is_secure() -> None:
    cookie = cookies(secure=True).render(SESSION)
    assert cookie.startswith("__Host-console=")
    assert cookie.endswith("; Secure")


def test_another_secret_still_decrypts_during_a_rotation() -> None:
    sent = cookies("old-secret-12").render(SESSION).split(";")[0]
    assert cookies("new-secret-12", "old-secret-12").read(sent) == (SESSION, False)
    assert cookies("new-secret-12").read(sent) == ({}, True)


def test_a_session_ends() -> None:
    old = {**SESSION, "began_at": int(time.time()) - 3601}
    assert cookies(hours=1).read(cookies().render(old).split(";")[0]) == ({}, True)


@pytest.mark.parametrize("sent", ["console_session=forged", "console_session=", "other=1", ""])
def test_other_cookies_are_no_session(sent: str) -> None:
    session, _ = cookies().read(sent)
    assert session == {}


def test_a_session_that_browsers_would_drop_is_an_error() -> None:
    with pytest.raises(ValueError, match="too large"):
        cookies().render({"token": "x" * 4000})
