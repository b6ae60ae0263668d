# SPDX-License-Identifier: Apache-2.0
"""The batcher under arrivals, cancellation, deadlines and failure; the network is a gate that tests open."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from detector import Detector
from detector.errors import NonFiniteFeatures
from detector.images import Pixels
from detector.policy import Verdict
from service.engine import Engine
from service.errors import DeadlinePassed, EngineLost, NotReady, QueueFull, ScoringFailed
from service.served import Answer, ServedModel
from tests.helpers import EMBEDDED, toy_images, toy_model


class Gate:
    """Stands where a detector stands: answers each image with its first byte, when it is open."""

    def __init__(self, *, is_open: bool = True, asynchronous: bool = False) -> None:
        self.opened, self.fetched = threading.Event(), threading.Event()
        self.entered, self.judged = threading.Event(), threading.Event()
        self.ran: list[int] = []
        self.checked: list[bool] = []
        self.batches: list[list[int]] = []
        self.shadows: list[bool] = []
        self.failing: set[int] = set()
        self.odd: set[int] = set()  # have no finite score
        self.unlike: set[int] = set()  # the network gives NaN
        self.asynchronous = asynchronous
        self.backbone = SimpleNamespace(outputs=self._outputs, input_shape=(2, 2, 3))
        self.fetched.set()
        if is_open:
            self.opened.set()

    def _outputs(self, images: torch.Tensor, *, checked: bool = True) -> torch.Tensor:
        self.ran.append(len(images))
        self.checked.append(checked)
        self.entered.set()
        assert self.opened.wait(20)
        values: list[int] = images[:, 0, 0, 0].tolist()
        if places := [place for place, value in enumerate(values) if value in self.unlike]:
            raise NonFiniteFeatures(places, "the network gave")
        return images[:, 0, 0, 0]

    def start_judging(self, outputs: torch.Tensor, decider: object, *, shadows: bool = True) -> torch.Tensor:
        self.shadows.append(shadows)
        return outputs

    def finish_judging(self, outputs: torch.Tensor, decider: object) -> list[SimpleNamespace]:
        assert self.fetched.wait(20)
        values = [int(value) for value in outputs]
        self.batches.append(values)
        if self.failing & set(values):
            raise RuntimeError("bad batch")
        self.judged.set()
        return [SimpleNamespace(value=value, ood=SimpleNamespace(sound=value not in self.odd)) for value in values]

    def judge(self, outputs: torch.Tensor, decider: object) -> list[SimpleNamespace]:
        return self.finish_judging(outputs, decider)

    @property
    def model(self) -> ServedModel:
        return ServedModel(cast(Any, self), cast(Any, None))


def image(value: int) -> Pixels:
    return np.full((2, 2, 3), value, dtype=np.uint8)


def run(body: Callable[[Engine], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        engine = Engine(**({"max_batch": 4, "capacity": 100, "timeout_s": 20.0, "stall_s": 60.0} | options))
        try:
            await body(engine)
        finally:
            await engine.close(20)

    asyncio.run(main())


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def value_of(answer: Answer) -> int:
    return cast(int, cast(Any, answer.verdict).value)


def test_what_waits_while_the_device_works_is_the_next_batch() -> None:
    gate = Gate(is_open=False)
    model = gate.model

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(0), soon()))
        await asyncio.to_thread(gate.entered.wait, 20)
        rest = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(1, 7)]
        await asyncio.sleep(0)  # let them queue
        gate.opened.set()
        answers = await asyncio.gather(first, *rest)
        assert [value_of(answer) for answer in answers] == list(range(7))
        assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]

    run(body)


def test_models_that_alternate_still_fill_batches_and_are_never_mixed() -> None:
    one, two = Gate(is_open=False), Gate()
    first, second = one.model, two.model

    async def body(engine: Engine) -> None:
        blocker = asyncio.create_task(engine.judge(first, image(0), soon()))
        await asyncio.to_thread(one.entered.wait, 20)
        mixed = [asyncio.create_task(engine.judge((first, second)[i % 2], image(i), soon())) for i in range(1, 5)]
        await asyncio.sleep(0)
        one.opened.set()
        await asyncio.gather(blocker, *mixed)
        assert (one.batches, two.batches) == ([[0], [2, 4]], [[1, 3]])

    run(body)


def test_an_expired_item_is_dropped_before_the_network() -> None:
    gate = Gate(is_open=False)
    model = gate.model

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(0), soon()))
        await asyncio.to_thread(gate.entered.wait, 20)
        with pytest.raises(DeadlinePassed):
            await engine.judge(model, image(1), soon(0.01))
        gate.opened.set()
        await first
        await engine.judge(model, image(2), soon())
        assert gate.batches == [[0], [2]]

    run(body)


def test_a_failing_batch_fails_its_own_and_the_loop_goes_on() -> None:
    gate = Gate()
    gate.failing = {1}
    model = gate.model

    async def body(engine: Engine) -> None:
        with pytest.raises(ScoringFailed, match="bad batch"):
            await engine.judge(model, image(1), soon())
        assert value_of(await engine.judge(model, image(2), soon())) == 2
        assert engine.alive

    run(body)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("where", ["odd", "unlike"])
def test_an_image_without_a_finite_score_fails_alone_and_its_neighbours_keep_their_verdicts(
    where: str, asynchronous: bool
) -> None:
    gate = Gate(is_open=False, asynchronous=asynchronous)
    setattr(gate, where, {2, 4})
    model = gate.model

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(9), soon()))
        await asyncio.to_thread(gate.entered.wait, 20)
        rest = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(1, 5)]
        await asyncio.sleep(0)
        gate.opened.set()
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        assert [value_of(result) if isinstance(result, Answer) else type(result) for result in results] == [
            9, 1, ScoringFailed, 3, ScoringFailed,
        ]  # fmt: skip
        assert engine.healthy

    run(body)


@pytest.mark.parametrize("where", ["odd", "unlike"])
def test_images_without_a_finite_score_one_after_another_do_not_make_a_sound_engine_unhealthy(where: str) -> None:
    gate = Gate()
    setattr(gate, where, {2})

    async def body(engine: Engine) -> None:
        for _ in range(5):
            with pytest.raises(ScoringFailed, match="no number"):
                await engine.judge(gate.model, image(2), soon())
        assert value_of(await engine.judge(gate.model, image(1), soon())) == 1
        assert engine.healthy

    run(body)


@pytest.mark.parametrize("where", ["odd", "unlike"])
def test_a_network_that_scores_nothing_makes_the_engine_unhealthy(where: str) -> None:
    gate = Gate()
    setattr(gate, where, {0, 2})  # the black image of the probe too
    model = gate.model

    async def body(engine: Engine) -> None:
        for _ in range(3):
            with pytest.raises(ScoringFailed):
                await engine.judge(model, image(2), soon())
        assert not engine.healthy
        setattr(gate, where, set())
        while not engine.healthy:  # the idle thread's own pulse probes it
            await asyncio.to_thread(gate.judged.wait, 20)

    run(body)


def lose_the_loop(engine: Engine, times: int) -> None:
    """Make the next batches end the inference loop, as an interrupt or a bug in it would."""
    launch, left = engine._launch, times

    def die(batch: Any) -> Any:
        nonlocal left
        if left == 0:
            return launch(batch)
        left -= 1
        raise SystemExit

    engine._launch = die  # type: ignore[method-assign]


def test_a_lost_loop_begins_again_and_only_the_batch_in_hand_is_lost() -> None:
    gate = Gate()
    model = gate.model
    restarts: list[int] = []

    async def body(engine: Engine) -> None:
        lose_the_loop(engine, times=1)
        waiting = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(9)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        lost = [result for result in results if isinstance(result, EngineLost)]
        answers = [value_of(result) for result in results if isinstance(result, Answer)]
        assert 1 <= len(lost) <= 4
        assert answers == list(range(len(lost), 9))
        assert engine.alive
        assert len(restarts) == 1

    run(body, on_restart=lambda: restarts.append(1))


def test_after_too_many_restarts_the_thread_ends_and_nobody_is_left_waiting() -> None:
    model = Gate().model

    async def body(engine: Engine) -> None:
        lose_the_loop(engine, times=99)
        waiting = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(40)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(result) for result in results} == {EngineLost}
        assert not engine.alive
        with pytest.raises(EngineLost), engine.admit(1):
            pass
        with pytest.raises(EngineLost):
            await engine.judge(model, image(0), soon())

    run(body)


def test_three_failed_batches_make_it_unhealthy_until_a_probe_succeeds() -> None:
    gate = Gate()
    model = gate.model

    async def body(engine: Engine) -> None:
        gate.failing = {0, 1}
        for _ in range(3):
            with pytest.raises(ScoringFailed):
                await engine.judge(model, image(1), soon())
        assert (engine.healthy, engine.alive) == (False, True)
        gate.failing = set()
        while not engine.healthy:  # the idle thread's own pulse probes it
            await asyncio.to_thread(gate.judged.wait, 20)
        assert gate.batches[-1] == [0]

    run(body)


@pytest.mark.parametrize("replaced", [True, False])
def test_when_the_model_that_failed_is_served_no_more_it_is_healthy_again(replaced: bool) -> None:
    failing, sound = Gate(), Gate()
    model, other = failing.model, sound.model
    failing.failing = {0, 1}

    async def body(engine: Engine) -> None:
        for _ in range(3):
            with pytest.raises(ScoringFailed):
                await engine.judge(model, image(1), soon())
        while not engine.healthy:  # until the idle thread's pulse
            await asyncio.to_thread(sound.judged.wait, 0.1)
        assert sound.ran == ([1] if replaced else [])

    run(body, in_place_of=lambda _: other if replaced else None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_device_of_its_own_is_not_asked_for_nan_while_it_works(asynchronous: bool) -> None:
    gate = Gate(asynchronous=asynchronous)
    model = gate.model

    async def body(engine: Engine) -> None:
        await engine.judge(model, image(1), soon())
        assert gate.checked == [not asynchronous]

    run(body)


def test_on_the_cpu_only_full_buckets_are_run() -> None:
    gate = Gate(is_open=False)
    model = gate.model

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(0), soon()))
        await asyncio.to_thread(gate.entered.wait, 20)
        rest = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(1, 8)]
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(first, *rest)
        assert [len(batch) for batch in gate.batches] == [1, 4, 2, 1]

    run(body, max_batch=8)


@pytest.mark.parametrize("gone", ["cancelled", "late"])
def test_callers_who_have_gone_take_no_place_in_a_batch(gone: str) -> None:
    gate = Gate(is_open=False)
    model = gate.model

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(0), soon()))
        await asyncio.to_thread(gate.entered.wait, 20)
        seconds = 0.01 if gone == "late" else 20.0
        leaving = [asyncio.create_task(engine.judge(model, image(i), soon(seconds))) for i in range(1, 4)]
        staying = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(4, 9)]
        await asyncio.sleep(0)
        if gone == "cancelled":
            for task in leaving:
                task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        gate.opened.set()
        await asyncio.gather(first, *staying)
        assert gate.ran == [1, 4, 1]  # and never 5, for which nothing is warm

    run(body, max_batch=8)


@pytest.mark.parametrize(
    ("left_s", "batches"),
    [
        ([100, 900, 900, 900, 900], [[2, 3, 4, 5], [1]]),  # 1 would be late in a batch of four, and is not given up
        ([100, 100, 900], [[3], [1], [2]]),  # a batch of two would be late, of one as well
        ([190, 190, 190, 190], [[1], [2], [3], [4]]),  # of one in time, while more at once would all be late
        ([300, 300, 300, 300], [[1, 2], [3, 4]]),
        ([900, 900, 900, 900], [[1, 2, 3, 4]]),
        ([100, 100], [[1], [2]]),  # an estimate by which nothing is in time may be wrong
    ],
)
def test_a_batch_is_of_images_that_are_in_time_at_its_end_while_there_are_any(
    left_s: list[float], batches: list[list[int]]
) -> None:
    gate = Gate(is_open=False)
    model = gate.model

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(0), soon(900)))
        assert await asyncio.to_thread(gate.entered.wait, 20)
        waiting = [asyncio.create_task(engine.judge(model, image(i + 1), soon(s))) for i, s in enumerate(left_s)]
        await asyncio.sleep(0)
        engine._image_seconds = 150.0  # as if an image took so long
        gate.opened.set()
        await asyncio.gather(first, *waiting)
        assert gate.batches[1:] == batches

    run(body)


def test_a_slow_model_whose_images_would_be_late_does_not_keep_a_quick_one_waiting() -> None:
    gate, quick = Gate(is_open=False), Gate()
    model, other = gate.model, quick.model
    quick.batches = gate.batches  # in one order

    async def body(engine: Engine) -> None:
        await engine.judge(other, image(9), soon())
        first = asyncio.create_task(engine.judge(model, image(0), soon(900)))
        assert await asyncio.to_thread(gate.entered.wait, 20)
        slow = [asyncio.create_task(engine.judge(model, image(i), soon(100))) for i in (1, 2)]
        fast = [asyncio.create_task(engine.judge(other, image(i), soon(100))) for i in (3, 4)]
        await asyncio.sleep(0)
        engine._seconds_of[model] = 2000.0
        gate.opened.set()
        await asyncio.gather(first, *slow, *fast)
        assert gate.batches == [[9], [0], [3, 4], [1], [2]]

    run(body)


def test_an_idle_engine_holds_no_model() -> None:
    model, freed = Gate().model, threading.Event()
    weakref.finalize(model, freed.set)

    async def body(engine: Engine) -> None:
        nonlocal model
        await engine.judge(model, image(1), soon())
        del model
        assert await asyncio.to_thread(freed.wait, 20)

    run(body)


def test_the_inference_thread_has_the_threads_of_the_settings() -> None:
    gate, threads = Gate(), list[int]()
    outputs = gate.backbone.outputs

    def counting(images: torch.Tensor, *, checked: bool = True) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return cast(torch.Tensor, outputs(images, checked=checked))

    gate.backbone.outputs = counting

    async def body(engine: Engine) -> None:
        await engine.judge(gate.model, image(1), soon())
        assert threads == [3]

    run(body, threads=3)


@pytest.fixture(scope="module")
def of_both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, calibrated in both precisions."""
    path = tmp_path_factory.mktemp("both") / "toy" / "1"
    toy_model(path, precisions=("fp32", "bf16"))
    return path


@pytest.mark.parametrize("which", ["toy fp32", "toy bf16", "embedded fp32"])
def test_the_company_of_an_image_moves_its_score_by_no_more_than_the_tolerance(of_both: Path, which: str) -> None:
    path, precision = EMBEDDED if which.startswith("embedded") else of_both, which.split()[1]
    detector = Detector.load(path, device="cpu", precision=cast(Any, precision))
    model, tolerance = ServedModel(detector, detector.decider), detector.manifest.score_tolerance[precision]
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    images = np.concatenate([toy_images(24, seed=70)[0], noise])

    def judged(size: int) -> list[Verdict]:
        """All, in full batches of one size."""
        answers, sizes = list[Answer](), list[int]()

        async def body(engine: Engine) -> None:
            answers.extend(await asyncio.gather(*(engine.judge(model, one, soon()) for one in images)))

        run(body, max_batch=size, window_s=1.0, on_batch=lambda _, batch: sizes.append(len(batch)))
        assert set(sizes) == {size}
        return [answer.verdict for answer in answers]

    alone, moves = judged(1), np.zeros(len(images))
    for size in (2, 3, 16, 48):
        for index, (first, second) in enumerate(zip(alone, judged(size), strict=True)):
            moved = abs(first.ood.score - second.ood.score)
            assert moved <= tolerance[first.ood.score_name]
            assert first.decision == second.decision or (first.ood.borderline and second.ood.borderline)
            moves[index] = max(moves[index], moved)
    # The same where an image lies so near to the threshold that its company decides.
    index = int(moves.argmax())
    model.decider.thresholds = [
        dataclasses.replace(cut, value=alone[index].ood.score) for cut in model.decider.thresholds
    ]
    for size in (1, 2, 3, 16, 48):
        assert judged(size)[index].ood.borderline


def test_on_a_device_of_its_own_a_batch_is_padded_and_nobody_sees_it() -> None:
    gate = Gate(is_open=False, asynchronous=True)
    model = gate.model

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(9), soon()))
        await asyncio.to_thread(gate.entered.wait, 20)
        rest = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(1, 4)]
        await asyncio.sleep(0)
        gate.opened.set()
        answers = await asyncio.gather(first, *rest)
        assert [value_of(answer) for answer in answers] == [9, 1, 2, 3]
        assert (gate.ran, gate.batches) == ([1, 4], [[9], [1, 2, 3]])

    run(body)


def test_a_device_of_its_own_has_its_next_batch_before_the_last_is_fetched() -> None:
    gate = Gate(is_open=False, asynchronous=True)
    gate.fetched.clear()
    model = gate.model

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(1), soon()))
        await asyncio.to_thread(gate.entered.wait, 20)
        second = asyncio.create_task(engine.judge(model, image(2), soon()))
        await asyncio.sleep(0)
        gate.entered.clear()
        gate.opened.set()
        assert await asyncio.to_thread(gate.entered.wait, 20)
        assert (gate.ran, gate.batches) == ([1, 1], [])
        gate.fetched.set()
        await asyncio.gather(first, second)
        assert gate.batches == [[1], [2]]

    run(body)


def test_a_window_waits_for_a_fuller_batch_and_no_longer_than_it_says() -> None:
    gate = Gate()
    model = gate.model

    async def body(engine: Engine) -> None:
        full = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(4)]
        await asyncio.gather(*full)  # a full batch leaves at once
        started = time.monotonic()
        alone = await engine.judge(model, image(9), soon())
        assert gate.batches == [[0, 1, 2, 3], [9]]
        assert 0.2 <= alone.timing.queue <= time.monotonic() - started

    run(body, window_s=0.2)


def test_the_window_of_an_image_that_waited_for_the_device_is_over() -> None:
    gate = Gate(is_open=False)
    model = gate.model

    async def body(engine: Engine) -> None:
        full = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(4)]
        assert await asyncio.to_thread(gate.entered.wait, 20)
        late = asyncio.create_task(engine.judge(model, image(9), soon(60)))
        await asyncio.sleep(0)
        engine._waiting[0].enqueued -= engine.window_s  # it came so much earlier
        gate.opened.set()
        await asyncio.wait_for(asyncio.gather(*full, late), engine.window_s / 2)
        assert gate.batches == [[0, 1, 2, 3], [9]]

    run(body, window_s=40.0)


def test_a_model_with_more_than_it_can_answer_in_time_leaves_others_their_turn() -> None:
    gate, other_gate = Gate(is_open=False), Gate()
    model, other = gate.model, other_gate.model
    other_gate.batches = gate.batches  # in one order

    async def body(engine: Engine) -> None:
        first = asyncio.create_task(engine.judge(model, image(0), soon(900)))
        assert await asyncio.to_thread(gate.entered.wait, 20)
        arrivals = [(model, 1, 100), (other, 2, 900), (model, 3, 900)]  # the first of them would be late
        waiting = [asyncio.create_task(engine.judge(m, image(value), soon(s))) for m, value, s in arrivals]
        await asyncio.sleep(0)
        engine._image_seconds = 150.0
        gate.opened.set()
        await asyncio.gather(first, *waiting)
        assert gate.batches == [[0], [2], [3], [1]]

    run(body)


def test_models_that_take_turns_have_their_shadows_scored_alike() -> None:
    gates = Gate(), Gate()
    models = [dataclasses.replace(gate.model, shadow_ratio=0.5) for gate in gates]

    async def body(engine: Engine) -> None:
        for value in range(4):
            for model in models:
                await engine.judge(model, image(value), soon())
        assert [gate.shadows for gate in gates] == [[False, True, False, True]] * 2

    run(body)


def test_shadows_are_scored_in_their_share_of_the_batches() -> None:
    gate = Gate()
    model = dataclasses.replace(gate.model, shadow_ratio=0.25)

    async def body(engine: Engine) -> None:
        for index in range(8):
            await engine.judge(model, image(index), soon())
        assert gate.shadows == [False, False, False, True] * 2

    run(body)


def test_room_is_taken_and_given_back() -> None:
    async def body(engine: Engine) -> None:
        with engine.admit(3):
            assert engine.depth == 3
            with pytest.raises(QueueFull) as full, engine.admit(3):
                pass
            assert full.value.retry_after_s == 1
        assert engine.depth == 0

    run(body, capacity=5)


def test_closing_answers_what_was_admitted_and_lets_nothing_in() -> None:
    gate = Gate(is_open=False)
    model = gate.model

    async def body(engine: Engine) -> None:
        waiting = [asyncio.create_task(engine.judge(model, image(i), soon())) for i in range(6)]
        await asyncio.to_thread(gate.entered.wait, 20)
        closing = asyncio.create_task(engine.close(20))
        await asyncio.sleep(0)
        with pytest.raises(NotReady), engine.admit(1):
            pass
        gate.opened.set()
        answers = await asyncio.gather(*waiting)
        await closing
        assert [value_of(answer) for answer in answers] == list(range(6))
        assert not engine.accepting

    run(body)


def test_closing_waits_for_an_image_that_is_still_being_decoded() -> None:
    gate = Gate()
    model = gate.model

    async def body(engine: Engine) -> None:
        with engine.admit(1):
            closing = asyncio.create_task(engine.close(20))
            await asyncio.sleep(0)
            assert value_of(await engine.judge(model, image(3), soon())) == 3
        await closing
        assert not engine.accepting

    run(body)


def test_a_batch_that_never_ends_turns_liveness_red() -> None:
    gate = Gate(is_open=False)
    model = gate.model

    async def body(engine: Engine) -> None:
        stuck = asyncio.create_task(engine.judge(model, image(0), soon()))
        await asyncio.to_thread(gate.entered.wait, 20)
        healthy = engine.alive
        engine._last_pulse -= 61
        stuck_too_long = not engine.alive
        assert (healthy, stuck_too_long) == (True, True)
        gate.opened.set()
        await stuck

    run(body)


def test_an_idle_engine_stays_alive() -> None:
    async def body(engine: Engine) -> None:
        pulse = engine._last_pulse
        with engine._changed:  # wake it as its own timer would
            engine._changed.notify()
        while engine._last_pulse == pulse:
            await asyncio.sleep(0)
        assert engine.alive

    run(body)


requests = st.tuples(
    st.sampled_from(["ask", "cancel", "fail", "late", "odd", "unlike"]), st.integers(1, 5), st.integers(0, 3)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=1, max_size=25), st.integers(1, 8), st.booleans())
def test_everyone_is_answered_exactly_once_in_order_whoever_leaves_is_late_or_fails(
    script: list[tuple[str, int, int]], max_batch: int, asynchronous: bool
) -> None:
    gate = Gate(asynchronous=asynchronous)
    model = gate.model
    kinds = [kind for kind, images, _ in script for _ in range(images)]  # of each image, by its value
    gate.failing, gate.odd, gate.unlike = (
        {value for value, kind in enumerate(kinds) if kind == wanted} for wanted in ("fail", "odd", "unlike")
    )
    delivered: list[int] = []

    async def request(engine: Engine, values: range, deadline: float) -> list[Answer | BaseException]:
        with engine.admit(len(values)):
            judging = (engine.judge(model, image(value), deadline) for value in values)
            return await asyncio.gather(*judging, return_exceptions=True)

    async def body(engine: Engine) -> None:
        tasks, first = [], 0
        for kind, images, yields in script:
            deadline = 0.0 if kind == "late" else soon()
            tasks.append(asyncio.create_task(request(engine, range(first, first + images), deadline)))
            first += images
            for _ in range(yields):
                await asyncio.sleep(0)
            if kind == "cancel":
                tasks[-1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        first = 0
        for (kind, images, _), result in zip(script, results, strict=True):
            values, first = range(first, first + images), first + images
            if isinstance(result, BaseException):
                assert (kind, type(result)) == ("cancel", asyncio.CancelledError)
                continue
            for value, one in zip(values, result, strict=True):
                if isinstance(one, Answer):
                    assert (value_of(one), kind in ("ask", "cancel")) == (value, True)
                else:  # a batch with a failing image fails whole, one with an odd image does not
                    expected = DeadlinePassed if kind == "late" else ScoringFailed
                    may_fail = kind in ("fail", "late", "odd", "unlike") or gate.failing
                    assert may_fail
                    assert isinstance(one, expected) or (gate.failing and isinstance(one, ScoringFailed))
        assert engine.depth == 0
        assert value_of(await engine.judge(model, image(255), soon())) == 255
        assert len(delivered) == len(set(delivered))

    def told(_: ServedModel, answers: Any) -> None:
        delivered.extend(value_of(answer) for answer in answers)

    run(body, max_batch=max_batch, capacity=1000, on_batch=told)
