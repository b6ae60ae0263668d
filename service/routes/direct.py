# SPDX-License-Identifier: Apache-2.0
"""The kind of route that images come in by."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from service.reading import FORM_TYPE, IMAGE_TYPES

_BYTES = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"file": {"type": "array", "items": _BYTES}}, "required": ["file"]}
IMAGES_BODY: dict[str, Any] = {
    "required": True,
    "content": {kind: {"schema": _BYTES} for kind in IMAGE_TYPES} | {FORM_TYPE: {"schema": _FORM}},
}


class DirectRoute(APIRoute):
    """A route whose endpoint is called with the request and its path, and nothing is solved for it.

    Resolving dependencies takes longer than all else that a small image costs the event loop.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            response: Response = await endpoint(
                request=request, context=request.app.state.context, **request.path_params
            )
            return response

        return handle
