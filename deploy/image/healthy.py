"""Health check of an image: request /healthz, or the path given as argument. Standard library only, because it runs
every few seconds."""

import os
import sys
from http.client import HTTPConnection, HTTPException

TIMEOUT_SEC = 4


def main() -> int:
    port = os.environ[f"{os.environ['SERVICE'].replace('-', '_').upper()}_PORT"]
    connection = HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_SEC)
    try:
        connection.request("GET", sys.argv[1] if len(sys.argv) > 1 else "/healthz")
        answer = connection.getresponse()
        said = answer.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        answer, said = None, str(error) or type(error).__name__
    sys.stdout.write(f"{said}\n")  # shown by docker inspect
    return 0 if answer is not None and answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
