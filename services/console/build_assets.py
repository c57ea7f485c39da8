"""Copy the browser packages into the console: `python services/console/build_assets.py [NPM]`.

It installs the locked npm packages without their scripts and copies the files that the pages use. Standard library
only, because the image build and the setup run it before other packages are there.
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


def main(npm: str) -> int:
    if shutil.which(npm) is None:
        sys.stderr.write(f"build_assets: {npm} not found: install Node.js with npm\n")
        return 2
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "npm"))
