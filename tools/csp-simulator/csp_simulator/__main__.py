"""Command line of the simulator: python -m csp_simulator --port 9200"""

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

# Injected hangs must not delay the stop.
STOP_TIMEOUT_SEC = 2
# Longer than clients keep an idle connection (httpx: 5 s, like uvicorn's default). If the server closed it first, a
# request could arrive during the close and be lost.
KEEP_ALIVE_SEC = 75


def main() -> None:
    """Serve until SIGTERM or SIGINT, then exit with 0. Exit with 2 if the simulator cannot start."""
    options = _parse_options()
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
        sys.exit(_report_error(str(error)))
    try:
        listener = socket.create_server((options.host, options.port), backlog=2048)
    except OSError as error:
        sys.exit(_report_error(f"cannot listen on {options.host}:{options.port}: {error.strerror}"))
    # uvicorn raises the signal again after its graceful stop. These handlers then end the process.
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop_signal, lambda *_: sys.exit(0))
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


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="csp_simulator",
        description=csp_simulator.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # A string, because argparse then validates a port from the environment like one from the command line.
    default_port = os.environ.get("CSP_SIMULATOR_PORT") or "9200"
    parser.add_argument(
        "--port", type=port, default=default_port, help="default: $CSP_SIMULATOR_PORT or 9200; 0: any free port"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument(
        "--accounts", type=count, default=50, help="create sandboxes up to this number; default: %(default)s"
    )
    parser.add_argument("--token", default=DEFAULT_TOKEN, help="accepted API token; default: %(default)s")
    parser.add_argument("--email", default=DEFAULT_EMAIL, help="email of the administrator; default: %(default)s")
    parser.add_argument("--password", default=DEFAULT_PASSWORD, help="the password; default: %(default)s")
    parser.add_argument("--state", type=Path, metavar="FILE", help="file that keeps the accounts between runs")
    parser.add_argument(
        "--name-prefix", default="sandbox-", help="name prefix of new accounts; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, help="makes random choices and the ids of new accounts repeatable")
    return parser.parse_args()


# The names of these two functions appear in argparse's error messages.
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


def _report_error(message: str) -> int:
    """Print the message and return the exit status."""
    print(f"csp_simulator: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
