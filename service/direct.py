# SPDX-License-Identifier: Apache-2.0
"""The short way of the requests that come in thousands a second.

FastAPI finds a route through six layers and solves its dependencies, which takes longer than all else that a small
image costs the event loop. Here the same endpoints are called with the request and its path; FastAPI keeps everything
else, and the document of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from detector.errors import OodgateError
from service import problems
from service.middleware import Observe


class Direct:
    """Answer POST requests of these routes; hand everything else on.

    Args:
        app: who gets everything else.
        routes: their endpoints take `request`, `context` and the parameters of their path, and return a response.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self.routes = [route for route in routes if isinstance(route, APIRoute)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            for route in self.routes:
                if found := route.path_regex.match(scope["path"]):
                    await _answer(route, found.groupdict(), scope, receive, send)
                    return
        await self.app(scope, receive, send)


class App(FastAPI):
    """FastAPI inside what happens to every request, beside the direct routes.

    Args:
        direct: see `Direct`.
        observed: arguments of `Observe`.
        options: as for FastAPI.
    """

    def __init__(self, direct: Sequence[BaseRoute], observed: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self._direct, self._observed = direct, observed

    def build_middleware_stack(self) -> ASGIApp:
        """Starlette asks for this once, before the first request."""
        stack = super().build_middleware_stack()
        assert isinstance(stack, ServerErrorMiddleware)  # Observe does its work, and knows who left from what failed
        return Observe(Direct(stack.app, self._direct), **self._observed)


async def _answer(route: APIRoute, parameters: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
    scope["route"] = route
    request = Request(scope, receive, send)
    try:
        response = await route.endpoint(request=request, context=scope["app"].state.context, **parameters)
    except OodgateError as error:
        response = problems.response(error, request)
    await response(scope, receive, send)
