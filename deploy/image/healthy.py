"""Health check of an image: request /healthz, or the path given as argument. Standard library only, because it runs
every few seconds."""

import os
import sys
import time
from http.client import HTTPConnection, HTTPException

TIMEOUT_SEC = 4
"""For all addresses together."""


def main() -> int:
    service = os.environ["SERVICE"]
    port = os.environ[f"{service.replace('-', '_').upper()}_PORT"]
    if service == "gateway":  # the only service that has more to serve than this
        port = os.environ.get("OPS_PORT") or port
    path = sys.argv[1] if len(sys.argv) > 1 else "/healthz"
    listed = [address.strip() for address in os.environ.get("BIND_HOST", "").split(",") if address.strip()]
    deadline = time.monotonic() + TIMEOUT_SEC
    status, said = None, ""
    for address in listed or ["127.0.0.1", "::1"]:
        status, said = ask(address, int(port), path, timeout_sec=max(deadline - time.monotonic(), 0.1))
        if status is not None:
            break
    sys.stdout.write(f"{said}\n")  # docker inspect shows it
    return 0 if status == 200 else 1


def ask(address: str, port: int, path: str, *, timeout_sec: float) -> tuple[int | None, str]:
    """Return the status, or None without an answer, and the text of the answer or of the failure."""
    connection = HTTPConnection(address, port, timeout=timeout_sec)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        return None, str(error) or type(error).__name__
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
