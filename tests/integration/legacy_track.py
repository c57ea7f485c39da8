"""Script of existing tracks, written for the predecessor of the broker: `python legacy_track.py allocate|cleanup`.

It sends the same requests and reads the same fields as these tracks. Never adapt it to a change of the broker.
"""
# ruff: noqa: T201

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import requests

API = os.environ["BROKER_API_URL"]
STUDENT_HEADER = os.environ.get("STUDENT_HEADER", "X-Instruqt-Sandbox-ID")  # X-Track-ID in older tracks
HEADERS = {
    "Authorization": f"Bearer {os.environ['BROKER_API_TOKEN']}",
    "Content-Type": "application/json",
    STUDENT_HEADER: os.environ["INSTRUQT_PARTICIPANT_ID"],
}


def allocate_sandbox() -> None:
    headers = {**HEADERS, "X-Instruqt-Track-ID": os.environ.get("INSTRUQT_TRACK_SLUG", "unknown-lab")}
    if "SANDBOX_NAME_PREFIX" in os.environ:
        headers["X-Sandbox-Name-Prefix"] = os.environ["SANDBOX_NAME_PREFIX"]
    response = requests.post(f"{API}/allocate", headers=headers, timeout=(5, 30))
    if response.status_code not in (200, 201):
        exit_refused(response)
    lease: dict[str, Any] = response.json()
    Path("sandbox_id.txt").write_text(lease["sandbox_id"])
    Path("external_id.txt").write_text(lease["external_id"].split("/")[-1])
    Path("sandbox_name.txt").write_text(lease["name"])
    print(response.status_code, int(lease["expires_at"]) - int(lease["allocated_at"]))


def release_sandbox() -> None:
    sandbox_id = Path("sandbox_id.txt").read_text().strip()
    url = f"{API}/sandboxes/{sandbox_id}/mark-for-deletion"
    response = requests.post(url, headers=HEADERS, timeout=(5, 30))
    if response.status_code != 200:
        exit_refused(response)
    body: dict[str, Any] = response.json()
    print(response.status_code, body["sandbox_id"], body["status"], int(body["deletion_requested_at"]))


def exit_refused(response: requests.Response) -> NoReturn:
    detail = response.json()["detail"]
    print(response.status_code, detail["code"], detail["message"])
    sys.exit(1)


if __name__ == "__main__":
    {"allocate": allocate_sandbox, "cleanup": release_sandbox}[sys.argv[1]]()
