"""Fork server: starts processes of a service as copies of a process that has imported its modules.

The imports are most of the processor time of a start, 0.6 to 1.6 s, and tests start hundreds of services. A copy
runs the launcher in `__main__` as a new interpreter does, with an environment, a session and output of its own.

`python -m devstack.fork_server MODULE FD` is the server. FD is a socket, from which it reads one message per start:
a JSON object with `launcher`, `environment` and `directory`, and the write ends of two pipes for the output and the
status. It writes the process id to the status pipe, and later the exit code. It ends when the socket closes.
"""

import asyncio
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from devstack.processes import Process, parent_death_prefix

_MAX_MESSAGE = 1 << 20
_PR_SET_PDEATHSIG = 1


def can_fork(environment: Mapping[str, str]) -> bool:
    """Return True on Linux, unless `environment` changes a variable that an interpreter reads at its start."""
    return hasattr(os, "pidfd_open") and all(
        environment.get(name) == os.environ.get(name)
        for name in {*environment, *os.environ}
        if name.startswith(("LD_", "PYTHON"))
    )


async def fork(
    name: str,
    module: str,
    launcher: str,
    *,
    env: Mapping[str, str],
    cwd: Path,
    on_line: Callable[[str], None] | None = None,
) -> Process:
    """Start the service `module` with `launcher`, which is `-m` or the path of a script that gets the module as its
    argument. The modules of the service are imported before the script starts."""
    # Like Popen, so that audit hooks see the start.
    sys.audit("subprocess.Popen", sys.executable, [sys.executable, launcher, module], str(cwd), None)
    request = {"launcher": launcher, "environment": dict(env), "directory": str(cwd)}
    output, output_end = os.pipe()
    status, status_end = os.pipe()
    try:
        socket.send_fds(_server(module), [json.dumps(request).encode()], [output_end, status_end])
    except OSError:
        os.close(output)
        os.close(status)
        raise
    finally:
        os.close(output_end)
        os.close(status_end)
    statuses = await _open_reader(status)
    pid = await statuses.readline()
    if not pid:
        os.close(output)
        raise ChildProcessError(f"the fork server of {module} has ended")
    return Process(name, _Copy(int(pid), await _open_reader(output), statuses), on_line)


class _Copy:
    """Copy of a fork server, with the part of asyncio.subprocess.Process that Process uses."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, statuses: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._ending = asyncio.create_task(self._read_exit_code(statuses))

    async def wait(self) -> int:
        return await asyncio.shield(self._ending)

    async def _read_exit_code(self, statuses: asyncio.StreamReader) -> int:
        # Without a code the server was killed, and the kernel has killed its copies.
        code = int(await statuses.read() or -signal.SIGKILL)
        self.returncode = code
        return code


async def _open_reader(pipe: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb", buffering=0)
    )
    return reader


@functools.cache
def _server(module: str) -> socket.socket:
    """Start the fork server of `module`, which runs until the end of this process. Return its socket."""
    control, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with remote:
        process = subprocess.Popen(
            [
                *parent_death_prefix(signal.SIGKILL),
                *(sys.executable, "-m", "devstack.fork_server", module, str(remote.fileno())),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[remote.fileno()],
            start_new_session=True,
        )
    atexit.register(_stop, control, process)
    return control


def _stop(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    control.close()
    process.wait()


def _serve(control: int) -> tuple[dict[str, Any], int] | None:
    """Fork a copy for each message until the socket closes. Return in each copy the message and its output."""
    statuses: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    # No object in this loop owns a descriptor, because a copy would close those descriptors again at its end.
    while True:
        for ready, _ in poll.poll():
            if ready != control:
                poll.unregister(ready)
                os.close(ready)
                pid, status = statuses.pop(ready)
                _write(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(status)
                continue
            message, descriptors = _receive(control)
            if not message:
                return None
            output, status = descriptors
            pid = os.fork()
            if pid == 0:
                for descriptor in (control, status, *statuses, *(other for _, other in statuses.values())):
                    os.close(descriptor)
                return json.loads(message), output
            os.close(output)
            _write(status, pid)
            descriptor = os.pidfd_open(pid)
            statuses[descriptor] = pid, status
            poll.register(descriptor, select.POLLIN)


def _receive(control: int) -> tuple[bytes, Sequence[int]]:
    connection = socket.socket(fileno=control)
    try:
        message, descriptors, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, 2)
    finally:
        connection.detach()
    return message, descriptors


def _write(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test has ended
        os.write(status, f"{number}\n".encode())


def _run(module: str, server: int, request: Mapping[str, Any], output: int) -> None:
    """Become the started process. `server` is the process id of the fork server."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # the server died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    launcher = request["launcher"]
    if launcher == "-m":
        sys.argv = [module]
        sys.path[0] = os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [launcher, module]
        sys.path[0] = str(Path(launcher).parent)
        runpy.run_path(launcher, run_name="__main__")


def main() -> None:
    module, control = sys.argv[1], int(sys.argv[2])
    importlib.import_module(f"{module}.main")
    gc.collect()
    gc.freeze()
    server = os.getpid()
    started = _serve(control)
    if started is not None:
        _run(module, server, *started)


if __name__ == "__main__":
    main()
