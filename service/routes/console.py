# SPDX-License-Identifier: Apache-2.0
"""The console: a static page with all it needs, read and compressed once, under a strict content security policy."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

from service.schemas import Problem

router = APIRouter(tags=["console"])

ROOT = Path(__file__).parents[1] / "console"
PAGE = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class Asset:
    """A file of the page, as it is and compressed."""

    body: bytes
    compressed: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """Every file of the page, by its path below the folder; nothing else is ever served."""
    found = {}
    for path in sorted(ROOT.rglob("*")):
        if path.suffix in _TYPES:
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
            name = path.relative_to(ROOT).as_posix()
            found[name] = Asset(body, gzip.compress(body, mtime=0), _TYPES[path.suffix], etag)
    return found


@router.get("/", operation_id="console", summary="The console", response_class=Response)
async def page(request: Request) -> Response:
    """A page for people: try an image, watch the server, read the model's card."""
    return _answer(request, PAGE)


@router.get(
    "/console/{path:path}",
    operation_id="console_asset",
    summary="A file of the console",
    response_class=Response,
    responses={404: {"model": Problem}},
)
async def asset(path: str, request: Request) -> Response:
    """Scripts, styles and sample images."""
    return _answer(request, path)


def _answer(request: Request, name: str) -> Response:
    found = assets().get(name)
    if found is None:
        raise HTTPException(404, f"the console has no file {name!r}")
    headers = _HEADERS | {"ETag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.compressed, headers=headers | {"Content-Encoding": "gzip"}, media_type=found.media_type)
    return Response(found.body, headers=headers, media_type=found.media_type)
