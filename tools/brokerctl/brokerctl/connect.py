"""TCP connection to the first address of a name that answers (RFC 8305).

The scripts in `instruqt/` hold the same functions, because each of them works alone.
"""

import contextlib
import errno
import os
import selectors
import socket
import time
from typing import Any

CONNECT_STAGGER_SEC = 0.25
"""Time for one address before the next one is tried as well."""


def start_connecting(info: tuple[Any, ...]) -> socket.socket:
    """Begin a connection without waiting. `info` is of getaddrinfo. Raises OSError, for example without IPv6."""
    family, kind, protocol, _, address = info
    attempt = socket.socket(family, kind, protocol)
    attempt.setblocking(False)
    code = attempt.connect_ex(address)
    if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
        attempt.close()
        raise OSError(code, os.strerror(code))
    return attempt


def connect_to_first(address: tuple[str, int], timeout: float, *_: object) -> socket.socket:
    """Connect to the address of the name that answers first. Try one more address each CONNECT_STAGGER_SEC.

    `socket.create_connection`, which this replaces, waits `timeout` for a silent address, as with broken IPv6.
    """
    waiting = socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM)
    error = OSError("the name has no address")
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as cleanup, selectors.DefaultSelector() as selector:
        while waiting or selector.get_map():
            if waiting:
                try:
                    attempt = start_connecting(waiting.pop(0))
                except OSError as refused:
                    error = refused
                else:
                    cleanup.callback(attempt.close)
                    selector.register(attempt, selectors.EVENT_WRITE, attempt)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            for key, _events in selector.select(min(left, CONNECT_STAGGER_SEC) if waiting else left):
                selector.unregister(key.data)
                code = key.data.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    connected = key.data.dup()  # the other sockets and this one are closed here
                    connected.settimeout(timeout)
                    return connected  # type: ignore[no-any-return]
                error = OSError(code, os.strerror(code))
    raise error
