# SPDX-License-Identifier: Apache-2.0
"""Requests and answers as values: what the two clients share, without any input or output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from oodgate_client.errors import (
    DeadlinePassed,
    ImageRefused,
    NotFound,
    OodgateError,
    Overloaded,
    RequestRefused,
    ServerFailed,
    TokenRefused,
    Unavailable,
    Unreachable,
)
from oodgate_client.images import content_type
from oodgate_client.models import ModelCard, ModelList, Verdict

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

READY = "/v2/health/ready"
_BY_STATUS: Mapping[int, type[OodgateError]] = {
    401: TokenRefused,
    403: TokenRefused,
    404: NotFound,
    408: DeadlinePassed,
    413: ImageRefused,
    415: ImageRefused,
    422: ImageRefused,
    429: Overloaded,
    503: Unavailable,
    504: DeadlinePassed,
}
# Broken before an answer came; a verdict has no effect on the server that a second one would double.
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout, httpx.ProxyError)


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and how to read the JSON and the headers of its answer."""

    method: str
    path: str
    read: Callable[[Any, Mapping[str, str]], T]
    content: bytes | None = None
    files: Sequence[tuple[str, tuple[str, bytes, str]]] | None = None
    headers: Mapping[str, str] | None = None


def check_address(url: str) -> None:
    """Raise ValueError where `url` cannot be the address of a server."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is no address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"the server's address must begin with http:// or https:// and name a host; got {url!r}")


def authorization(token: str | None) -> dict[str, str]:
    """The header that carries a token; ValueError, which does not repeat it, for one that no header can carry."""
    if token is None:
        return {}
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise ValueError("the token is empty or holds a space, a line break or a letter outside ASCII; strip it")
    return {"Authorization": f"Bearer {token}"}


def verdict_path(model: str | None, version: str | None) -> str:
    """Where a model judges; ValueError for a version without its model."""
    if model is None:
        if version is not None:
            raise ValueError("a version needs the name of its model")
        return "/v1/verdict"
    of_model = f"/v1/models/{quote(model, safe='')}"
    return f"{of_model}/verdict" if version is None else f"{of_model}/versions/{quote(version, safe='')}/verdict"


def verdict_call(path: str, image: bytes) -> Call[Verdict]:
    """Judge one image."""
    headers = {"Content-Type": content_type(image)}
    return Call("POST", path, _as(Verdict), content=image, headers=headers)


def verdicts_call(path: str, images: Sequence[bytes]) -> Call[list[Verdict | OodgateError]]:
    """Judge several images in one form, in order."""
    files = [("file", (str(index), data, content_type(data))) for index, data in enumerate(images)]
    return Call("POST", path, _items, files=files)


def models_call() -> Call[list[ModelCard]]:
    """The cards of all models."""
    return Call("GET", "/v1/models", lambda content, _: list(ModelList.model_validate(content).models))


def model_call(name: str) -> Call[ModelCard]:
    """The card of one model."""
    return Call("GET", f"/v1/models/{quote(name, safe='')}", _as(ModelCard))


def read_answer(call: Call[T], answer: httpx.Response) -> T:
    """The call's result; raises what the answer's status and problem document say."""
    content = _json(answer)
    if answer.status_code != 200:
        raise _problem(answer.status_code, content, answer.headers)
    try:
        return call.read(content, answer.headers)
    except (ValidationError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        detail = f"{answer.url} answered what this client does not understand: {reason}"
        raise ServerFailed(detail, "unexpected_answer", 200, _request_id(answer.headers)) from error


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what the HTTP library raises into the client's own errors."""
    try:
        yield
    except _BROKEN as error:
        raise Unreachable(f"no answer from {url}: {error or type(error).__name__}", "unreachable") from error
    except httpx.TimeoutException as error:
        raise DeadlinePassed(f"no answer from {url} in time: {type(error).__name__}", "client_timeout") from error
    except httpx.HTTPError as error:
        raise ServerFailed(f"no usable answer from {url}: {error}", "unexpected_answer") from error


def _as(kind: type[M]) -> Callable[[Any, Mapping[str, str]], M]:
    return lambda content, _: kind.model_validate(content)


def _items(content: Any, headers: Mapping[str, str]) -> list[Verdict | OodgateError]:
    if "verdicts" not in content:
        return [Verdict.model_validate(content)]  # a form with one file is answered without the list
    return [
        _problem(item["problem"]["status"], item["problem"], headers)
        if "problem" in item
        else Verdict.model_validate(item)
        for item in content["verdicts"]
    ]


def _problem(status: int, content: Any, headers: Mapping[str, str]) -> OodgateError:
    """The error of a problem document, or of an answer by something in between that knows none."""
    document = content if isinstance(content, dict) else {}
    kind = _BY_STATUS.get(status, RequestRefused if 400 <= status < 500 else ServerFailed)
    index, request_id = document.get("index"), document.get("request_id")
    return kind(
        str(document.get("detail", f"HTTP {status} without a problem document")),
        str(document.get("code", "unexpected_answer")),
        status,
        str(request_id) if request_id else _request_id(headers),
        index if isinstance(index, int) else None,
        _retry_after(headers.get("retry-after", "")),
    )


def _retry_after(value: str) -> float | None:
    """Seconds, from either form that HTTP allows; None where it is absent or is neither."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _request_id(headers: Mapping[str, str]) -> str:
    return headers.get("x-request-id", "")


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None
