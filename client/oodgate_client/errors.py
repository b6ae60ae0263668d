# SPDX-License-Identifier: Apache-2.0
"""Every error of the client, one tree.

    OodgateError                    code, status, detail, request_id, index
    ├── RequestRefused              400, 404 and other 4xx: the same request would be refused again
    │   ├── ImageRefused (ValueError)    413, 415, 422: this image cannot be judged
    │   ├── TokenRefused            401, 403
    │   └── NotFound (LookupError)  404: no model or version of that name
    └── Unanswered                  no verdict could be had; the fail policy of a gate decides
        ├── Unreachable             no connection, or one that broke; retried
        ├── DeadlinePassed          408, 504, or a time limit of the client
        ├── Overloaded              429; retried
        ├── Unavailable             503; retried
        └── ServerFailed            other 5xx, or an answer that oodgate does not give

`code` is a stable word for programs: the server's own where it answered with a problem document.
"""

from __future__ import annotations

from typing import ClassVar


class OodgateError(Exception):
    """Root of all errors of the client.

    Args:
        detail: what was seen and what to do.
        code: a stable word for programs.
        status: of the HTTP answer; None where there was none.
        request_id: the id under which the server's log has the request; empty where there was no answer.
        index: the place of the image in its request, where one image is to blame.
        retry_after_s: seconds the server asked to wait.
    """

    retried: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        code: str,
        status: int | None = None,
        request_id: str = "",
        index: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail, code, status, request_id, index, retry_after_s)  # all of them, so that it pickles
        self.detail, self.code, self.status, self.request_id = detail, code, status, request_id
        self.index, self.retry_after_s = index, retry_after_s

    def __str__(self) -> str:
        where = [self.code]
        where += [] if self.status is None else [f"HTTP {self.status}"]
        where += [f"request {self.request_id}"] if self.request_id else []
        return f"{self.detail} ({', '.join(where)})"


class RequestRefused(OodgateError):
    """The server refuses this request and would refuse it again."""


class ImageRefused(RequestRefused, ValueError):
    """The image cannot be judged: too large, of another format, damaged, or none at all."""


class TokenRefused(RequestRefused):
    """The bearer token is missing, unknown, or not allowed to do this."""


class NotFound(RequestRefused, LookupError):
    """There is no model or version of that name."""


class Unanswered(OodgateError):
    """No verdict could be had, through no fault of the request."""


class Unreachable(Unanswered):
    """The server cannot be reached, or the connection broke."""

    retried = True


class DeadlinePassed(Unanswered):
    """No answer came in time, by the client's clock or by the server's."""


class Overloaded(Unanswered):
    """The server has as much under way as it admits."""

    retried = True


class Unavailable(Unanswered):
    """The server is not ready, or is stopping."""

    retried = True


class ServerFailed(Unanswered):
    """The server failed, or what answered is no oodgate server."""
