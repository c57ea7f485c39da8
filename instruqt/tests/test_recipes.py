"""Recipes of instruqt/README.md: their scripts run as Instruqt runs them, with the home directory replaced."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import SCRIPTS, CannedServer, Reply, Run, Track, build_json_reply, build_lease_reply, build_track
from .recipes import PAGE, read_recipe

RELEASED = build_json_reply(200, {"sandbox_id": "2012224", "status": "pending_deletion"})
EXTENDED = build_json_reply(200, {"expires_at": 1728075723, "max_expires_at": 1728082923})


class Lab:
    """Host of a lab. Its scripts are in the home directory."""

    def __init__(self, track: Track, broker: CannedServer, recipe: str) -> None:
        self.track = track
        self.broker = broker
        self.scripts = read_recipe(recipe)
        for script in SCRIPTS.glob("instruqt_broker_*"):
            shutil.copy(script, track.directory)
        track.environment["PATH"] = f"{Path(sys.executable).parent}:{track.environment['PATH']}"

    def run(self, role: str, *replies: Reply, **variables: str | None) -> Run:
        """Run a script of the recipe, while the broker sends `replies`."""
        path = self.track.directory.parent / role
        path.write_text(self.scripts[role].replace("/root", str(self.track.directory)))
        path.chmod(0o755)
        self.broker.calls.clear()
        self.broker.replies = list(replies)
        return self.track.run(str(path), **variables)

    def add_command(self, name: str, text: str) -> None:
        path = self.track.directory.parent / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        self.track.environment["PATH"] = f"{path.parent}:{self.track.environment['PATH']}"

    def read(self, name: str) -> str:
        return (self.track.directory / name).read_text("utf-8")

    @property
    def paths(self) -> list[str]:
        return [call.path.removeprefix("/v1/") for call in self.broker.calls]


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path: Path, broker: CannedServer) -> Lab:
    return Lab(build_track(tmp_path, broker), broker, request.param)


@pytest.mark.parametrize("lab", ["plain track", "image without Python"], indirect=True)
def test_a_track_allocates_and_releases(lab: Lab) -> None:
    run = lab.run("setup", build_lease_reply())
    assert (run.code, run.err) == (0, "")
    assert "This student works in sandbox-1" in run.out
    run = lab.run("cleanup", RELEASED)
    assert (run.code, run.err) == (0, "")
    assert lab.paths == ["sandboxes/2012224/mark-for-deletion"]


@pytest.mark.parametrize("lab", ["hot start"], indirect=True)
@pytest.mark.parametrize("unset", [None, ""], ids=["unset", "empty"])
def test_a_hot_start_claims_with_the_student(lab: Lab, unset: str | None) -> None:
    pooled = {"INSTRUQT_PARTICIPANT_ID": unset, "_SANDBOX_ID": "pooled-1"}
    assert lab.run("setup", build_lease_reply(), **pooled).code == 0
    assert lab.broker.calls[0].headers["X-Lease-Mode"] == "standby"
    assert lab.run("challenge", **pooled).code == 0
    assert lab.paths == []
    assert lab.run("challenge", build_lease_reply(200)).code == 0
    (call,) = lab.broker.calls
    assert (call.path, call.headers["X-New-Holder"]) == ("/v1/sandboxes/2012224/claim", "student-1")
    assert lab.run("cleanup", RELEASED).code == 0
    assert lab.broker.calls[0].headers["X-Instruqt-Sandbox-ID"] == "student-1"


@pytest.mark.parametrize("lab", ["long workshop"], indirect=True)
def test_a_long_workshop_extends_and_survives_a_refusal(lab: Lab) -> None:
    (policy,) = yaml.safe_load(lab.scripts["policy"])
    assert policy["lease_hours"] == 8
    (lab.track.directory / "sandbox_id.txt").write_text("2012224")
    assert lab.run("challenge", EXTENDED).code == 0
    assert lab.paths == ["sandboxes/2012224/extend"]
    run = lab.run("challenge", build_json_reply(409, {"detail": {"code": "EXTENSION_LIMIT", "message": "No."}}))
    assert run.code == 0
    assert "the lab continues" in run.out


@pytest.mark.parametrize("lab", ["paused track"], indirect=True)
def test_a_paused_track_prepares_each_sandbox_once(lab: Lab) -> None:
    (lab.track.directory / "prepare_sandbox.sh").write_text("#!/bin/sh\necho prepared >>prepared.log\n")
    (lab.track.directory / "prepare_sandbox.sh").chmod(0o755)
    for lease in (build_lease_reply(), build_lease_reply(200), build_lease_reply(201, sandbox_id="2012225")):
        assert lab.run("setup", lease).code == 0
    assert lab.read("prepared.log") == "prepared\n" * 2
    assert lab.read("sandbox_id.txt") == "2012225"


@pytest.mark.parametrize("lab", ["login inside the sandbox"], indirect=True)
def test_a_track_shows_the_login_to_its_student(lab: Lab) -> None:
    lab.add_command("agent", 'echo "$*" >>agent.log')
    login = {
        "status": "ready",
        "email": "s@labs",
        "password": "A!b?1'x",
        "user_id": "u",
        "login_url": "https://csp",
    }
    run = lab.run("setup", build_lease_reply(), build_json_reply(200, login))
    assert (run.code, run.err) == (0, "")
    assert "The student signs in at https://csp as s@labs." in run.out
    assert lab.read("agent.log").splitlines()[-2:] == [
        "variable set CSP_USER_EMAIL s@labs",
        "variable set CSP_USER_PASSWORD A!b?1'x",
    ]
    assert lab.run("cleanup", RELEASED).code == 0


@pytest.mark.parametrize("lab", ["existing tracks"], indirect=True)
def test_a_track_of_the_newer_generation_finds_its_ids(lab: Lab) -> None:
    assert lab.run("setup", build_lease_reply()).code == 0
    assert lab.read("sandbox_id.txt") == "af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"
    assert lab.read("subtenant_id.txt") == "2012224"
    assert lab.read("sandbox_name.txt") == "sandbox-1"
    assert lab.run("cleanup", RELEASED).code == 0
    assert lab.paths == ["sandboxes/2012224/mark-for-deletion"]


@pytest.mark.parametrize("lab", ["Terraform"], indirect=True)
def test_a_failed_destroy_does_not_keep_the_sandbox(lab: Lab) -> None:
    lab.add_command("terraform", 'echo "$1 $TF_VAR_student_tenant" >>terraform.log; [ "$1" != destroy ]')
    assert lab.run("setup", build_lease_reply()).code == 0
    run = lab.run("cleanup", RELEASED)
    assert run.code == 0
    assert lab.paths == ["sandboxes/2012224/mark-for-deletion"]
    assert lab.read("terraform.log").splitlines() == ["init sandbox-1", "apply sandbox-1", "destroy sandbox-1"]
    assert lab.run("cleanup", build_json_reply(403, {"detail": {"code": "FORBIDDEN", "message": "No."}})).code == 0


def test_every_recipe_is_listed_and_tested() -> None:
    titles = re.findall(r"^## Recipe: (.*)", PAGE, re.M)
    listed = re.findall(r"\(#recipe-([\w-]+)\)", PAGE.partition("## Environment")[0])
    assert [title.lower().replace(" ", "-") for title in titles] == listed
    tested = set(re.findall(r'\["(.*?)"(?:, "(.*?)")?\], indirect', Path(__file__).read_text("utf-8")))
    assert set(titles) == {title for pair in tested for title in pair if title}
