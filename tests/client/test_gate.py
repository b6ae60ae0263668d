# SPDX-License-Identifier: Apache-2.0
"""The gate calls the model where the verdict is accept, and the fallback elsewhere."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import numpy as np
import pytest

from oodgate_client import (
    AsyncClient,
    AsyncGate,
    Client,
    Gate,
    ImageRefused,
    NotFound,
    Outcome,
    Retry,
    ServerFailed,
    TokenRefused,
    Unreachable,
)
from oodgate_client.gate import FailPolicy
from tests.client.conftest import DEFERRED, VERDICT, Scripted, problem
from tests.e2e.server import free_port
from tests.helpers import GOOD, encoded
from tests.service.conftest import Running

NOISE = encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
ONCE = Retry(attempts=1)


def ask_human(outcome: Outcome, image: bytes) -> Outcome:
    return outcome


@pytest.fixture
def client(served: Running) -> Iterator[Client]:
    with Client(served.url) as client:
        yield client


@pytest.fixture
def absent() -> Iterator[Client]:
    """A client of a server that is not there."""
    with Client(f"http://127.0.0.1:{free_port()}", retry=ONCE) as client:
        yield client


def test_an_accepted_image_reaches_the_model_and_a_deferred_one_the_fallback(client: Client) -> None:
    gate = Gate(client)
    called: list[bytes] = []

    @gate(fallback=ask_human)
    def classify(image: bytes) -> str:
        called.append(image)
        return "blue"

    assert classify(GOOD) == "blue"
    outcome = classify(NOISE)
    assert isinstance(outcome, Outcome)
    assert outcome.verdict is not None
    assert (outcome.verdict.reason, outcome.error) == ("ood", None)
    assert called == [GOOD]


def test_an_image_that_cannot_be_judged_never_reaches_the_model(client: Client) -> None:
    for policy in ("closed", "open"):
        outcome = Gate(client, fail_policy=policy).check(b"junk")
        assert not outcome.passed
        assert isinstance(outcome.error, ImageRefused)


def test_a_closed_gate_gives_the_fallback_the_error(absent: Client) -> None:
    outcome = Gate(absent)(fallback=ask_human)(lambda image: "blue")(GOOD)
    assert isinstance(outcome, Outcome)
    assert isinstance(outcome.error, Unreachable)
    assert outcome.verdict is None


def test_an_open_gate_calls_the_model_and_says_so(absent: Client, caplog: pytest.LogCaptureFixture) -> None:
    assert Gate(absent, fail_policy="open")(fallback=ask_human)(lambda image: "blue")(GOOD) == "blue"
    assert "the gate fails open" in caplog.text


@pytest.mark.parametrize(("policy", "passed"), [("closed", False), ("open", True)])
def test_the_fail_policy_decides_where_scoring_fails(scripted: Scripted, policy: FailPolicy, passed: bool) -> None:
    scripted.script = [(500, {}, problem(500, "scoring_failed"))]
    outcome = Gate(Client(scripted.url), fail_policy=policy).check(GOOD)
    assert outcome.passed is passed
    assert isinstance(outcome.error, ServerFailed)
    assert outcome.error.code == "scoring_failed"


@pytest.mark.parametrize("policy", ["closed", "open"])
def test_a_mistake_of_the_caller_is_raised_under_either_policy(scripted: Scripted, policy: FailPolicy) -> None:
    scripted.script = [(401, {}, problem(401, "unauthorized")), (404, {}, problem(404, "model_not_found"))]
    gate = Gate(Client(scripted.url), fail_policy=policy)
    with pytest.raises(TokenRefused):
        gate.check(GOOD)
    with pytest.raises(NotFound):
        gate.check(GOOD)


def test_the_function_can_have_the_outcome(client: Client) -> None:
    @Gate(client).with_outcome(fallback=ask_human)
    def classify(outcome: Outcome, image: bytes) -> str:
        assert outcome.verdict is not None
        return outcome.verdict.prediction.label

    assert classify(GOOD) in ("red", "green", "blue", "grey")
    assert isinstance(classify(NOISE), Outcome)
    assert list(inspect.signature(classify).parameters) == ["image"]


def test_the_image_can_lie_anywhere_in_the_arguments(client: Client) -> None:
    gate = Gate(client)

    class App:
        @gate(fallback=lambda outcome, self, name, photo: "human", image=lambda self, name, photo: photo)
        def classify(self, name: str, photo: bytes) -> str:
            return name

    assert App().classify("model", GOOD) == "model"
    assert App().classify("model", photo=NOISE) == "human"
    with pytest.raises(TypeError, match="image="):
        gate(fallback=ask_human)(lambda image: "blue")(image=GOOD)


def test_an_async_function_is_gated_by_the_async_gate(scripted: Scripted) -> None:
    scripted.script = [(200, {}, VERDICT), (200, {}, DEFERRED), (200, {}, VERDICT), (422, {}, problem(422, "bad"))]

    async def to_human(outcome: Outcome, image: bytes) -> str:
        return "human"

    async def run() -> list[str]:
        async with AsyncClient(scripted.url) as client:
            gate = AsyncGate(client)

            @gate(fallback=to_human)
            async def classify(image: bytes) -> str:
                return "model"

            @gate.with_outcome(fallback=to_human)
            async def explain(outcome: Outcome, image: bytes) -> str:
                assert outcome.verdict is not None
                return outcome.verdict.prediction.label

            assert list(inspect.signature(explain).parameters) == ["image"]
            return [await classify(GOOD), await classify(GOOD), await explain(GOOD), await explain(GOOD)]

    assert asyncio.run(run()) == ["model", "human", "blue", "human"]


@pytest.mark.parametrize(("policy", "answer"), [("closed", "human"), ("open", "model")])
def test_the_async_gate_has_the_same_fail_policies(policy: FailPolicy, answer: str) -> None:
    async def to_human(outcome: Outcome, image: bytes) -> str:
        return "human"

    async def model(image: bytes) -> str:
        return "model"

    async def run() -> str:
        async with AsyncClient(f"http://127.0.0.1:{free_port()}", retry=ONCE) as client:
            return await AsyncGate(client, fail_policy=policy)(fallback=to_human)(model)(GOOD)

    assert asyncio.run(run()) == answer


def test_an_async_function_behind_the_blocking_gate_is_refused(client: Client) -> None:
    async def classify(image: bytes) -> str:
        return "blue"

    with pytest.raises(TypeError, match="AsyncGate"):
        Gate(client)(fallback=ask_human)(classify)


def test_a_fail_policy_of_another_name_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="closed"):
        Gate(client, fail_policy="ajar")  # type: ignore[arg-type]
