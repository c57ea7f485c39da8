"""Run the simulator: python -m csp_simulator --port 9200"""

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

import csp_simulator
from csp_simulator.accounts import StateError
from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD, DEFAULT_TOKEN, create_app

# A call that hangs on purpose must not keep the simulator from stopping.
STOP_TIMEOUT_SEC = 2
# Longer than clients keep an idle connection (httpx: 5 s, uvicorn's own value too): were it closed here first, a
# request could be sent into the closing and be lost.
KEEP_ALIVE_SEC = 75


def main() -> None:
    """Serve until SIGTERM or SIGINT, then exit with 0; with 2 if it cannot start."""
    options = _options()
    try:
        app = create_app(
            accounts=options.accounts,
            token=options.token,
            email=options.email,
            password=options.password,
            name_prefix=options.name_prefix,
            state_file=options.state,
            seed=options.seed,
        )
    except StateError as error:
        sys.exit(_refuse(str(error)))
    try:
        listener = socket.create_server((options.host, options.port), backlog=2048)
    except OSError as error:
        sys.exit(_refuse(f"cannot listen on {options.host}:{options.port}: {error.strerror}"))
    # uvicorn stops gracefully and then raises the signal again, which ends here.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(0))
    print(f"CSP simulator: http://{options.host}:{listener.getsockname()[1]}/v2", flush=True)
    config = uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_level="critical",
        timeout_graceful_shutdown=STOP_TIMEOUT_SEC,
        timeout_keep_alive=KEEP_ALIVE_SEC,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="csp_simulator",
        description=csp_simulator.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # As a text, so that argparse judges a port from the environment like one from the command line.
    default_port = os.environ.get("CSP_SIMULATOR_PORT") or "9200"
    parser.add_argument(
        "--port", type=port, default=default_port, help="default: $CSP_SIMULATOR_PORT or 9200; 0: any"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--accounts", type=count, default=50, help="top up to this many active sandboxes")
    parser.add_argument("--token", default=DEFAULT_TOKEN, help="what the API accepts; default: %(default)s")
    parser.add_argument("--email", default=DEFAULT_EMAIL, help="who may sign in to NIOSXaaS; default: %(default)s")
    parser.add_argument("--password", default=DEFAULT_PASSWORD, help="with this; default: %(default)s")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep the accounts here between runs")
    parser.add_argument("--name-prefix", default="sandbox-", help="of new accounts; default: %(default)s")
    parser.add_argument("--seed", type=int, help="makes chance and the ids of new accounts repeatable")
    return parser.parse_args()


# argparse puts the names of these two into its messages.
def port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError
    return number


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _refuse(reason: str) -> int:
    print(f"csp_simulator: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
