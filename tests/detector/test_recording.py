# SPDX-License-Identifier: Apache-2.0
"""The forward recorded for each bucket: what it answers, and in which order the device is told; on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from detector.backbone import Run
from detector.recording import WARM_UP, Bucketed, Pair, recorded

IMAGES = torch.arange(1, 9, dtype=torch.uint8)[:, None, None, None].expand(8, 2, 2, 3).contiguous()


def network(images: Tensor) -> Pair:
    features = images.flatten(1).float()
    return features.sum(dim=1, keepdim=True), features


class Recorder:
    """Stands where CUDA graphs stand: each size answers in one place, over and over."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, forward: Run, images: Tensor) -> Run:
        self.sizes.append(len(images))
        place = tuple(part.clone() for part in forward(images))

        def run(images: Tensor) -> Pair:
            for part, found in zip(place, forward(images), strict=True):
                part.copy_(found)
            return place[0], place[1]

        return run


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8])
def test_a_batch_that_does_not_fill_its_bucket_gives_what_the_forward_gives(n: int) -> None:
    for found, expected in zip(Bucketed(network, Recorder())(IMAGES[:n]), network(IMAGES[:n]), strict=True):
        assert torch.equal(found, expected)


def test_each_bucket_is_recorded_once() -> None:
    recorder = Recorder()
    bucketed = Bucketed(network, recorder)
    for n in (1, 3, 4, 2, 7, 1, 8, 3):
        bucketed(IMAGES[:n])
    assert recorder.sizes == [1, 4, 2, 8]


def test_a_batch_beyond_the_largest_is_cut() -> None:
    recorder = Recorder()
    for found, expected in zip(Bucketed(network, recorder, largest=4)(IMAGES[:7]), network(IMAGES[:7]), strict=True):
        assert torch.equal(found, expected)
    assert recorder.sizes == [4]


def test_an_answer_stays_when_the_next_batch_runs() -> None:
    bucketed = Bucketed(network, Recorder())
    logits, penultimate = bucketed(IMAGES[:2])
    bucketed(IMAGES[4:6])
    assert torch.equal(logits, network(IMAGES[:2])[0])
    assert torch.equal(penultimate, network(IMAGES[:2])[1])


def test_two_threads_take_turns_at_the_one_place_of_a_graph() -> None:
    inside, most, count = threading.Lock(), [0], [0]

    def watched(forward: Run, images: Tensor) -> Run:
        def run(images: Tensor) -> Pair:
            with inside:
                count[0] += 1
                most[0] = max(most[0], count[0])
            found = forward(images)
            with inside:
                count[0] -= 1
            return found

        return run

    bucketed = Bucketed(network, watched)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: bucketed(IMAGES[i : i + 1])[0].item(), [*range(8)] * 50))
    assert most == [1]
    assert answers == [network(IMAGES[i : i + 1])[0].item() for i in range(8)] * 50


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the device is told, in order."""
    told: list[str] = []

    class Stream:
        def __init__(self, name: str = "beside", priority: int = 0) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    @contextmanager
    def recording(graph: Graph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        told.append(f"record {stream.name}, {capture_error_mode}")
        yield
        told.append("recorded")

    cuda: dict[str, Any] = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": recording,
        "current_stream": lambda: Stream("current"),
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return told


def test_a_recording_follows_runs_on_a_stream_of_its_own(steps: list[str]) -> None:
    def forward(images: Tensor) -> Pair:
        steps.append("forward")
        return network(images)

    recorded(forward, IMAGES)
    beside = ["beside waits for current", *["forward"] * WARM_UP, "current waits for beside"]
    assert steps == [*beside, "record beside, thread_local", "forward", "recorded"]


def test_a_replay_reads_the_images_where_they_were_recorded(steps: list[str]) -> None:
    seen: list[Tensor] = []

    def forward(images: Tensor) -> Pair:
        seen.append(images)
        return network(images)

    run = recorded(forward, IMAGES)
    steps.clear()
    run(IMAGES.flip(0))
    assert steps == ["replay"]
    assert torch.equal(seen[-1], IMAGES.flip(0))
    assert len({images.data_ptr() for images in seen}) == 1
    assert torch.equal(IMAGES[0], torch.ones(2, 2, 3, dtype=torch.uint8))  # those of the caller are left alone
