# SPDX-License-Identifier: Apache-2.0
"""A batch shared out between threads by its images."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest
import torch
from torch import Tensor

from detector import sharing
from detector.backbone import Backbone
from detector.cifar_resnet import CifarResNet18
from detector.networks import CIFAR_PREPROCESSING
from detector.sharing import shared_out
from tests.helpers import ROOT, toy_images, toy_network


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Recorder:
    """A network that gives each image back, and remembers in what pieces and with how many threads it ran."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((len(images), torch.get_num_threads()))
        return images[:, 0, 0, :1].float(), images[:, 0, 0].float()


def numbered(n: int, side: int = 2) -> Tensor:
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, side, side, 3).contiguous()


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 31, 32, 37, 64])
def test_every_image_keeps_its_place(n: int) -> None:
    first, second = shared_out(Recorder(), numbered(n))
    assert first.flatten().tolist() == list(range(n))
    assert second.shape == (n, 3)


@pytest.mark.parametrize(
    ("n", "side", "threads", "pieces"),
    [
        (16, 32, 2, [(8, 1)] * 2),
        (16, 224, 2, [(4, 1)] * 4),
        (16, 32, 4, [(8, 2)] * 2),
        (16, 224, 4, [(4, 1)] * 4),
        (16, 224, 3, [(16, 3)]),  # four pieces for three threads: one would run alone at the end
        (15, 32, 2, [(15, 2)]),
        (16, 32, 1, [(16, 1)]),
    ],
)
def test_pieces_are_cut_by_the_number_of_images_and_threads(
    n: int, side: int, threads: int, pieces: list[tuple[int, int]]
) -> None:
    torch.set_num_threads(threads)
    network = Recorder()
    shared_out(network, numbered(n, side))
    assert network.seen == pieces
    assert torch.get_num_threads() == threads


def test_two_threads_run_pieces_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=60)

    def meeting(images: Tensor) -> tuple[Tensor, Tensor]:
        both.wait()  # passes only if the other piece runs meanwhile
        return Recorder()(images)

    shared_out(meeting, numbered(16))


@pytest.mark.parametrize("piece", [0, 8])
def test_an_error_in_one_piece_is_raised_when_all_threads_have_stopped(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, running, waited_for = threading.Barrier(2, timeout=60), {0, 8}, threading.Event()

    def waiting(helping: list[Future[None]]) -> object:
        waited_for.set()
        return wait(helping)

    def failing(images: Tensor) -> tuple[Tensor, Tensor]:
        first = int(images[0, 0, 0, 0])
        both.wait()
        if first != piece and threading.current_thread() is not threading.main_thread():
            assert waited_for.wait(60)  # by the main thread, which has failed
        running.discard(first)
        if first == piece:
            raise ValueError("this piece")
        return Recorder()(images)

    monkeypatch.setattr(sharing, "wait", waiting)
    with pytest.raises(ValueError, match="this piece"):
        shared_out(failing, numbered(16))
    assert not running
    assert torch.get_num_threads() == 2
    first, _ = shared_out(Recorder(), numbered(16))
    assert first.flatten().tolist() == list(range(16))


def test_a_batch_whose_helpers_are_busy_is_run_by_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    with ThreadPoolExecutor(1) as busy:
        busy.submit(free.wait)
        monkeypatch.setattr(sharing, "_helpers", lambda: busy)
        network = Recorder()
        first, _ = shared_out(network, numbered(16))
        free.set()
    assert first.flatten().tolist() == list(range(16))
    assert network.seen == [(8, 1)] * 2


FORKED = """
import os, torch
from detector.sharing import shared_out

torch.set_num_threads(2)
images = torch.zeros(16, 2, 2, 3, dtype=torch.uint8)
run = lambda images: (images[:, 0, 0], images[:, 0, 0])
shared_out(run, images)
if (child := os.fork()) == 0:
    os._exit(len(shared_out(run, images)[0]))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 16)
"""


def test_a_forked_process_has_helpers_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(
    ("reentrant", "width", "pieces"),
    [
        (True, 8, [8, 8]),
        (False, 8, [16]),  # only one thread may run it
        (True, 2, [16]),  # so small that a second thread would come too late
    ],
)
def test_a_network_is_shared_out_where_that_is_safe_and_worth_it(
    reentrant: bool, width: int, pieces: list[int]
) -> None:
    class Counted:
        def __init__(self) -> None:
            self.reentrant, self.seen = reentrant, list[int]()

        def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
            self.seen.append(len(images))
            return torch.zeros(len(images), 3), torch.zeros(len(images), 8)

    network = Counted()
    backbone = Backbone(CifarResNet18(3, width), CIFAR_PREPROCESSING)
    backbone.with_forward(network, "compiled").outputs(torch.from_numpy(toy_images(16, seed=0)[0]))
    assert network.seen == pieces


def test_a_shared_batch_gives_the_answers_of_small_ones() -> None:
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING)
    images = torch.from_numpy(toy_images(37, seed=0)[0])
    together = backbone.outputs(images)
    for start in range(0, 37, 5):
        alone = backbone.outputs(images[start : start + 5])
        assert torch.allclose(alone.logits, together.logits[start : start + 5], rtol=1e-4, atol=1e-4)
        assert torch.allclose(alone.penultimate, together.penultimate[start : start + 5], rtol=1e-4, atol=1e-4)
