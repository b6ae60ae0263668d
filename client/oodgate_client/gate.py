# SPDX-License-Identifier: Apache-2.0
"""Call a model only where the verdict is accept, and a fallback otherwise."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from oodgate_client.client import AsyncClient, Client
from oodgate_client.errors import ImageRefused, OodgateError, Unanswered
from oodgate_client.images import Image
from oodgate_client.models import Verdict

log = logging.getLogger("oodgate_client")

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F")
FailPolicy = Literal["closed", "open"]


@dataclass(frozen=True)
class Outcome:
    """What a gate says of one image.

    Args:
        passed: the model may be called.
        verdict: the server's answer; None where there is none.
        error: why there is none; None where there is one.
    """

    passed: bool
    verdict: Verdict | None = None
    error: OodgateError | None = None


def first_argument(*args: Any, **kwargs: Any) -> Any:
    """The image is the first positional argument."""
    if not args:
        raise TypeError("the gate takes the first positional argument as the image; else tell it where by image=")
    return args[0]


class _Policy:
    """Exceptions -> outcomes, the same for both gates."""

    def __init__(self, fail_policy: FailPolicy) -> None:
        if fail_policy not in ("closed", "open"):
            raise ValueError(f"fail_policy is 'closed' or 'open'; got {fail_policy!r}")
        self.fail_policy = fail_policy

    def _judged(self, verdict: Verdict) -> Outcome:
        return Outcome(verdict.accepted, verdict)

    def _unanswered(self, error: Unanswered) -> Outcome:
        log.warning("no verdict, the gate fails %s: %s", self.fail_policy, error)
        return Outcome(self.fail_policy == "open", error=error)


class Gate(_Policy):
    """A gate in front of functions.

    An accepted image passes, a deferred one does not. An image that the server refuses (damaged, too large) never
    passes. Where no verdict can be had the fail policy decides. A wrong token, model or version is raised: a gate that
    can never open, or never close, is a mistake to mend.

    Args:
        client: asks the server.
        fail_policy: where no verdict can be had, `closed` calls the fallback and `open` calls the model.
    """

    def __init__(self, client: Client, *, fail_policy: FailPolicy = "closed") -> None:
        super().__init__(fail_policy)
        self.client = client

    def check(self, image: Image) -> Outcome:
        """Judge an image; RequestRefused where the request itself is wrong."""
        try:
            return self._judged(self.client.verdict(image))
        except Unanswered as error:
            return self._unanswered(error)
        except ImageRefused as error:
            return Outcome(False, error=error)

    def __call__(
        self, *, fallback: Callable[..., F], image: Callable[..., Image] = first_argument
    ) -> Callable[[Callable[P, R]], Callable[P, R | F]]:
        """Decorate a function: it runs where the image passes, `fallback(outcome, *args, **kwargs)` elsewhere.

        Args:
            fallback: called with the outcome and the function's own arguments.
            image: finds the image in the function's arguments.
        """

        def decorate(function: Callable[P, R]) -> Callable[P, R | F]:
            @functools.wraps(function)
            def gated(*args: P.args, **kwargs: P.kwargs) -> R | F:
                outcome = self.check(image(*args, **kwargs))
                return function(*args, **kwargs) if outcome.passed else fallback(outcome, *args, **kwargs)

            _refuse_async(function)
            return gated

        return decorate

    def with_outcome(
        self, *, fallback: Callable[..., F], image: Callable[..., Image] = first_argument
    ) -> Callable[[Callable[Concatenate[Outcome, P], R]], Callable[P, R | F]]:
        """As calling the gate, for a function that takes the outcome before its own arguments."""

        def decorate(function: Callable[Concatenate[Outcome, P], R]) -> Callable[P, R | F]:
            def gated(*args: P.args, **kwargs: P.kwargs) -> R | F:
                outcome = self.check(image(*args, **kwargs))
                return (function if outcome.passed else fallback)(outcome, *args, **kwargs)

            _refuse_async(function)
            _pose_as(gated, function)
            return gated

        return decorate


class AsyncGate(_Policy):
    """As Gate, for async functions; the fallback is async too."""

    def __init__(self, client: AsyncClient, *, fail_policy: FailPolicy = "closed") -> None:
        super().__init__(fail_policy)
        self.client = client

    async def check(self, image: Image) -> Outcome:
        """As Gate.check."""
        try:
            return self._judged(await self.client.verdict(image))
        except Unanswered as error:
            return self._unanswered(error)
        except ImageRefused as error:
            return Outcome(False, error=error)

    def __call__(
        self, *, fallback: Callable[..., Awaitable[F]], image: Callable[..., Image] = first_argument
    ) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R | F]]]:
        """As calling a Gate."""

        def decorate(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R | F]]:
            @functools.wraps(function)
            async def gated(*args: P.args, **kwargs: P.kwargs) -> R | F:
                outcome = await self.check(image(*args, **kwargs))
                if outcome.passed:
                    return await function(*args, **kwargs)
                return await fallback(outcome, *args, **kwargs)

            return gated

        return decorate

    def with_outcome(
        self, *, fallback: Callable[..., Awaitable[F]], image: Callable[..., Image] = first_argument
    ) -> Callable[[Callable[Concatenate[Outcome, P], Awaitable[R]]], Callable[P, Awaitable[R | F]]]:
        """As Gate.with_outcome."""

        def decorate(function: Callable[Concatenate[Outcome, P], Awaitable[R]]) -> Callable[P, Awaitable[R | F]]:
            async def gated(*args: P.args, **kwargs: P.kwargs) -> R | F:
                outcome = await self.check(image(*args, **kwargs))
                if outcome.passed:
                    return await function(outcome, *args, **kwargs)
                return await fallback(outcome, *args, **kwargs)

            _pose_as(gated, function)
            return gated

        return decorate


def _pose_as(gated: Callable[..., Any], function: Callable[..., Any]) -> None:
    # The outcome is ours to give: frameworks that read the signature must not ask their callers for it.
    functools.update_wrapper(gated, function)
    signature = inspect.signature(function)
    gated.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]


def _refuse_async(function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{function!r} is async, and this gate would block its event loop; use AsyncGate")
