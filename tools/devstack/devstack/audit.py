"""`python -m devstack.audit`: run pip-audit on the locked requirements.

A known vulnerability is a failure. An unreachable vulnerability database is not, because `make check` must work
without internet. AUDIT_URL names another server with the query API of OSV, such as a mirror.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from devstack.settings import ROOT

DATABASE_URL = "https://api.osv.dev/v1/query"
CONNECT_SEC = 5.0
AUDIT_SEC = 600.0
_SHOWN_CHARACTERS = 500
_PROBE = {"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "23.0"}


def main(root: Path = ROOT) -> int:
    return audit_locks(sorted((root / "requirements").glob("*.txt")), os.environ.get("AUDIT_URL") or DATABASE_URL)


def audit_locks(locks: Sequence[Path], database_url: str) -> int:
    """Return the exit status: 1 for a known vulnerability or for requirements unreadable to pip-audit."""
    obstacle = _probe(database_url)
    if obstacle is not None:
        return _report_unreachable(database_url, obstacle)
    vulnerable: set[str] = set()
    failed = False
    for lock in locks:
        done = _run_pip_audit(lock, database_url)
        report = _vulnerable_packages(done.stdout)
        vulnerable.update(report)
        if done.returncode != 0 and not report:
            # The database may have become unreachable between two queries.
            obstacle = _probe(database_url)
            if obstacle is not None and not vulnerable:
                return _report_unreachable(database_url, obstacle)
            print(f"pip-audit failed for {lock.name}: {done.stderr.strip()[:_SHOWN_CHARACTERS]}", file=sys.stderr)
            failed = True
    for line in sorted(vulnerable):
        print(line, file=sys.stderr)
    if not vulnerable and not failed:
        print(f"no known vulnerability in {len(locks)} locked requirements files")
    return 1 if vulnerable or failed else 0


def _report_unreachable(database_url: str, obstacle: str) -> int:
    print(f"not audited: the vulnerability database {database_url} was not reached ({obstacle})")
    return 0


def _probe(database_url: str) -> str | None:
    """Return why the database does not answer a query, or None."""
    try:
        response = httpx.post(database_url, json=_PROBE, timeout=CONNECT_SEC)
        response.raise_for_status()
        response.json()
    except (httpx.HTTPError, ValueError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _run_pip_audit(lock: Path, database_url: str) -> "subprocess.CompletedProcess[str]":
    """Audit one file, because pip-audit refuses a package that two files name."""
    arguments = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    arguments += ["--vulnerability-service", "osv", "--osv-url", database_url]
    arguments += ["--requirement", str(lock)]
    return subprocess.run(
        [sys.executable, "-m", "pip_audit", *arguments],
        capture_output=True,
        text=True,
        timeout=AUDIT_SEC,
        check=False,
    )


def _vulnerable_packages(report: str) -> list[str]:
    """Return a line for each vulnerable package of pip-audit's report, which is empty when the audit failed."""
    try:
        dependencies: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except ValueError:
        return []
    return [
        f"{dependency['name']} {dependency['version']} has {vulnerability['id']}, "
        f"fixed in {', '.join(vulnerability['fix_versions']) or 'no version'}"
        for dependency in dependencies
        for vulnerability in dependency.get("vulns", [])
    ]


if __name__ == "__main__":
    raise SystemExit(main())
