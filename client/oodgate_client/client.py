# SPDX-License-Identifier: Apache-2.0
"""The two clients: one that blocks, one for asyncio. What they send and read is in `wire`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import httpx

from oodgate_client import wire
from oodgate_client.errors import ImageRefused, OodgateError, Unanswered
from oodgate_client.images import Image, read
from oodgate_client.models import ModelCard, Verdict
from oodgate_client.retry import Attempts, Retry
from oodgate_client.wire import Call

T = TypeVar("T")


class _Settings:
    """What both clients are told."""

    def __init__(
        self, url: str, token: str | None, model: str | None, version: str | None, timeout_s: float, retry: Retry
    ) -> None:
        wire.check_address(url)
        wire.verdict_path(model, version)  # so that a version without its model is refused here
        self.url, self.timeout_s, self.retry = url.rstrip("/"), timeout_s, retry
        self._judge = model, version
        self._authorization = wire.authorization(token)

    def _path(self, model: str | None, version: str | None) -> str:
        default_model, default_version = self._judge
        return wire.verdict_path(model or default_model, version or (None if model else default_version))

    def _request(self, call: Call[Any], left_s: float) -> Mapping[str, Any]:
        """The arguments of the HTTP library's `request`."""
        return {
            "method": call.method,
            "url": f"{self.url}{call.path}",
            "content": call.content,
            "files": call.files,
            "headers": {"Accept": "application/json", **self._authorization, **(call.headers or {})},
            "timeout": min(self.timeout_s, left_s),
            "follow_redirects": False,  # a token must not travel to where an answer points
        }


class Client(_Settings):
    """Asks an oodgate server, and waits for the answer. Threads may share one; `with` closes it.

    Args:
        url: of the server, `http://localhost:8000`.
        token: bearer token, where the server asks for one.
        model, version: who judges where a call names no other; the server's default model and the version it serves
            where not given.
        timeout_s: seconds for each step of one attempt: connecting, sending, and each wait for a part of the answer.
        retry: attempts, back-off and the deadline of all together.
        http: an HTTP client of your own, for proxies or certificates; it stays yours to close.
        sleep: waits between attempts.

    Raises:
        ValueError: no address of a server, a token that no header can carry, or a version without its model.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        model: str | None = None,
        version: str | None = None,
        timeout_s: float = 10.0,
        retry: Retry | None = None,
        http: httpx.Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(url, token, model, version, timeout_s, retry or Retry())
        self._http, self._owned, self._sleep = http or httpx.Client(), http is None, sleep

    def verdict(self, image: Image, *, model: str | None = None, version: str | None = None) -> Verdict:
        """Judge one image: its bytes, the path of its file, or a binary file.

        Raises:
            ImageRefused: it is no image that the server takes.
            RequestRefused: a wrong token, model or version.
            Unanswered: no verdict could be had in time.
        """
        return self._send(wire.verdict_call(self._path(model, version), read(image)))

    def verdicts(
        self, images: Sequence[Image], *, model: str | None = None, version: str | None = None
    ) -> list[Verdict | OodgateError]:
        """Judge several images in one request, in order; an image that fails has its error in its place.

        Raises:
            RequestRefused: as for `verdict`, or more images than the server takes at once.
            Unanswered: no verdict could be had in time.
        """
        if not images:
            return []
        try:
            return self._send(wire.verdicts_call(self._path(model, version), [read(image) for image in images]))
        except ImageRefused as error:
            return _alone(error)

    def models(self) -> list[ModelCard]:
        """The cards of all models."""
        return self._send(wire.models_call())

    def model(self, name: str) -> ModelCard:
        """The card of one model; NotFound where there is none of that name."""
        return self._send(wire.model_call(name))

    def ready(self) -> bool:
        """May traffic be sent to the server now? One attempt; False where it cannot be reached."""
        try:
            answer = self._http.get(f"{self.url}{wire.READY}", timeout=self.timeout_s, headers=self._authorization)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    def close(self) -> None:
        """Close its connections."""
        if self._owned:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        attempts = Attempts(self.retry)
        while True:
            try:
                with wire.translated(self.url):
                    answer = self._http.request(**self._request(call, attempts.left_s))
                return wire.read_answer(call, answer)
            except Unanswered as error:
                wait = attempts.wait_after(error)
            self._sleep(wait)


class AsyncClient(_Settings):
    """As Client, for asyncio; `async with` closes it."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        model: str | None = None,
        version: str | None = None,
        timeout_s: float = 10.0,
        retry: Retry | None = None,
        http: httpx.AsyncClient | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(url, token, model, version, timeout_s, retry or Retry())
        self._http, self._owned, self._sleep = http or httpx.AsyncClient(), http is None, sleep

    async def verdict(self, image: Image, *, model: str | None = None, version: str | None = None) -> Verdict:
        """As Client.verdict."""
        data = await asyncio.to_thread(read, image)
        return await self._send(wire.verdict_call(self._path(model, version), data))

    async def verdicts(
        self, images: Sequence[Image], *, model: str | None = None, version: str | None = None
    ) -> list[Verdict | OodgateError]:
        """As Client.verdicts."""
        if not images:
            return []
        data = await asyncio.to_thread(lambda: [read(image) for image in images])
        try:
            return await self._send(wire.verdicts_call(self._path(model, version), data))
        except ImageRefused as error:
            return _alone(error)

    async def models(self) -> list[ModelCard]:
        """As Client.models."""
        return await self._send(wire.models_call())

    async def model(self, name: str) -> ModelCard:
        """As Client.model."""
        return await self._send(wire.model_call(name))

    async def ready(self) -> bool:
        """As Client.ready."""
        url = f"{self.url}{wire.READY}"
        try:
            answer = await self._http.get(url, timeout=self.timeout_s, headers=self._authorization)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def aclose(self) -> None:
        """Close its connections."""
        if self._owned:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def _send(self, call: Call[T]) -> T:
        attempts = Attempts(self.retry)
        while True:
            try:
                with wire.translated(self.url):
                    answer = await self._http.request(**self._request(call, attempts.left_s))
                return wire.read_answer(call, answer)
            except Unanswered as error:
                wait = attempts.wait_after(error)
            await self._sleep(wait)


def _alone(error: ImageRefused) -> list[Verdict | OodgateError]:
    # A form with one file is answered as a single image is.
    if error.index is None:  # the request as a whole: too many bytes, or too many images
        raise error
    return [error]
