"""Shell scripts with the shells of Debian, Alpine and others, and on a host without Python and jq."""

import os
import shutil
from pathlib import Path

import pytest

from devstack.output import Terminal
from devstack.packages import find_or_install
from devstack.processes import run

from .conftest import (
    ALLOCATION,
    SCRIPTS,
    CannedServer,
    Reply,
    Track,
    build_html_reply,
    build_json_reply,
    build_lease_reply,
    build_refusal,
    build_track,
)
from .test_script_waiting import build_place_reply

NAME = 'it\'s "tän" ☃ $HOME `x` \\ 🐙\n'


@pytest.fixture(scope="session")
async def busybox_host(server_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory for PATH with the commands of busybox and curl, like an image of Alpine: no Python, jq and GNU tools.

    Belongs to the server lane, because it may install packages.
    """
    busybox, curl = [await find_or_install([name], name, Terminal()) for name in ("busybox", "curl")]
    directory = tmp_path_factory.mktemp("busybox")
    _, listed = await run([busybox, "--list"], timeout=60)
    for applet in listed.split():
        (directory / applet).symlink_to(busybox)
    (directory / "curl").symlink_to(curl)
    directory.chmod(0o755)  # for a test with another user
    return directory


@pytest.fixture(params=["busybox", "dash", "bash"])
def shell_track(request: pytest.FixtureRequest, busybox_host: Path, tmp_path: Path, broker: CannedServer) -> Track:
    track = build_track(tmp_path, broker)
    if request.param == "busybox":
        track.shell = (str(busybox_host / "sh"),)
        track.environment["PATH"] = str(busybox_host)
        return track
    shell = shutil.which(request.param)
    if shell is None:
        pytest.skip(f"{request.param} is not installed")
    track.shell = (shell,)
    return track


def test_a_lease_is_granted_after_waiting_and_faults(shell_track: Track, broker: CannedServer) -> None:
    broker.replies = [
        build_html_reply(403),
        build_place_reply(2),
        build_place_reply(1, estimated_wait_sec=30),
        Reply(drops=True),
        build_lease_reply(name=NAME),
    ]
    result = shell_track.allocate()
    assert (result.code, result.err) == (0, "")
    assert "waiting in line at position 1. The estimated wait is 30 s." in result.out
    files = shell_track.files()
    assert files["sandbox_name.txt"] == NAME
    assert set(files) == {"sandbox_id.txt", "external_id.txt", "sandbox_name.txt", "sandbox_env.sh"}
    sourced = shell_track.run(*shell_track.shell, "-c", '. ./sandbox_env.sh && printf "%s" "$STUDENT_TENANT"')
    assert sourced.out == NAME


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (build_lease_reply(name=NAME).body, NAME),
        (
            '{"name": "ä\\/ \\"}{\\\\", "sandbox_id":"2012224" ,\n"external_id" : "u",'
            '"a":[{"name":"x"}],"b":{"name":"y"}, "c": -1.5e3, "d": null}'.encode(),
            'ä/ "}{\\',
        ),
    ],
    ids=["escapes", "UTF-8"],
)
def test_any_text_of_json_is_decoded(shell_track: Track, broker: CannedServer, body: bytes, name: str) -> None:
    broker.replies = [Reply(201, body)]
    assert shell_track.allocate().code == 0
    assert shell_track.files()["sandbox_name.txt"] == name


def test_options_and_cleanup(shell_track: Track, broker: CannedServer) -> None:
    released = build_json_reply(200, {"sandbox_id": "2012225", "status": "pending_deletion"})
    broker.replies = [
        build_lease_reply(),
        build_lease_reply(200),
        build_json_reply(200, {"expires_at": 1728075723, "max_expires_at": 1728082923}),
        build_lease_reply(201, sandbox_id="2012225"),
        released,
    ]
    assert shell_track.allocate("--standby", INSTRUQT_PARTICIPANT_ID=None).code == 0
    assert shell_track.allocate("--claim").code == 0
    extended = shell_track.allocate("--extend", "1.5")
    assert "ends at 2024-10-04 21:02:03 UTC" in extended.out
    assert shell_track.allocate("--replace", "broken").code == 0
    assert shell_track.clean_up().code == 0
    assert [call.path.removeprefix("/v1/") for call in broker.calls] == [
        "allocate",
        "sandboxes/2012224/claim",
        "sandboxes/2012224/extend",
        "sandboxes/2012224/replace",
        "sandboxes/2012225/mark-for-deletion",
    ]


def test_a_refusal_and_a_wrong_setting(shell_track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(409, "POOL_EXHAUSTED")]
    assert shell_track.allocate().code == 1
    assert shell_track.allocate(BROKER_TIMEOUT_SEC="soon").code == 2
    assert shell_track.files() == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_a_file_of_another_user_in_a_sticky_directory_prevents_the_request(
    shell_track: Track, broker: CannedServer
) -> None:
    shell_track.directory.chmod(0o1777)
    for parent in shell_track.directory.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)
    shell_track.directory.parent.chmod(0o755)
    (shell_track.directory / "external_id.txt").write_text("of root")
    # A copy, because the other user may not be able to read the checkout.
    script = shutil.copy(SCRIPTS / f"{ALLOCATION}.sh", shell_track.directory.parent)
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    result = shell_track.run(setpriv, "--reuid", "65534", "--clear-groups", *shell_track.shell, str(script))
    assert result.code == 2
    assert "external_id.txt: it belongs to another user, and the directory is sticky" in result.err
    assert broker.calls == []
