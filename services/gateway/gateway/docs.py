"""The docs page: Swagger UI from our own address, so that it works with no internet and no inline script."""

from importlib.resources import files
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

_STATIC = Path(__file__).parent / "static"


async def _page(_: Request) -> Response:
    return FileResponse(_STATIC / "docs.html")


async def _start(_: Request) -> Response:
    return FileResponse(_STATIC / "start.js")


def routes() -> list[Route | Mount]:
    # fastapi-offline is used for the files it carries: a released Swagger UI, hash-locked like the rest.
    assets = StaticFiles(directory=str(files("fastapi_offline") / "static"))
    return [
        Route("/v1/docs", _page),
        Route("/v1/docs/start.js", _start),
        Mount("/v1/docs/assets", assets),
    ]
