# SPDX-License-Identifier: Apache-2.0
"""From the eager to the compiled forward, beside a server: with a real compiler, once, on a small network."""

from __future__ import annotations

import logging
import os
import select
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from detector import Detector, artifact as artifacts
from detector.compiled import CompiledForward
from detector.compiling import libraries
from detector.policy import DOUBT
from detector.settling import ForwardState, Settling, compiler, share_of_time
from service.settings import Settings
from tests.helpers import GOOD, ROOT, toy_images
from tests.service.conftest import serving
from tests.service.test_verdict import post
from tests.service.test_versions import wait_until

PATIENCE_S = 600.0
THREADS = torch.get_num_threads()

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX, g++ or clang++)")


@pytest.fixture(scope="module")
def eager(toy_models: Path) -> Detector:
    return Detector.load(toy_models / "toy" / "1", device="cpu")


@pytest.fixture(scope="module", autouse=True)
def no_race() -> Iterator[None]:
    """Which forward is the faster one here is nothing that a test could know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detector.settling.share_of_time", lambda *_: 0.9)
        yield


@pytest.fixture(scope="module")
def settled(eager: Detector, toy_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Detector]]:
    """Where the compiled forward is kept, and the detectors that were handed over; made by a relative path."""
    base = tmp_path_factory.mktemp("base")
    handed: list[Detector] = []
    with chdir(base):
        model, kept = toy_models / "toy" / "1", Path("state/compile")
        settling = Settling(eager, model, kept, handed.append, threads=THREADS, niceness=0)
        settling.start()
        assert settling.state == ForwardState("cpu", "fp32", "eager", settled=False)
        assert settling.wait(PATIENCE_S)
        settling.close()
    assert settling.state == ForwardState("cpu", "fp32", "compiled", settled=True)
    return base / "state" / "compile", handed


def settle(detector: Detector, model: Path, directory: Path) -> tuple[ForwardState, list[Detector]]:
    handed: list[Detector] = []
    settling = Settling(detector, model, directory, handed.append, threads=THREADS, niceness=0)
    settling.start()
    assert settling.wait(PATIENCE_S)
    settling.close()
    return settling.state, handed


@needs_compiler
def test_the_compiled_forward_is_handed_over_once(settled: tuple[Path, list[Detector]]) -> None:
    _, handed = settled
    assert [detector.backbone.mode for detector in handed] == ["compiled"]


@needs_compiler
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 37])
def test_compiled_answers_are_those_of_the_eager_forward(
    settled: tuple[Path, list[Detector]], eager: Detector, n: int
) -> None:
    images, _ = toy_images(n, seed=21)
    (compiled,) = settled[1]
    first, second = eager.outputs(images), compiled.outputs(images)
    assert torch.allclose(first.logits, second.logits, rtol=1e-4, atol=1e-4 * float(first.logits.abs().max()))
    assert torch.allclose(first.penultimate, second.penultimate, rtol=1e-4, atol=1e-5)
    tolerance = compiled.manifest.score_tolerance["fp32"]
    assert tolerance[DOUBT] > 0
    before, after = eager.scores(first), compiled.scores(second)
    assert all(np.abs(before[name] - after[name]).max() <= tolerance[name] for name in before)


@needs_compiler
def test_a_compiled_forward_that_is_slower_is_left_alone(
    settled: tuple[Path, list[Detector]],
    eager: Detector,
    toy: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("detector.settling.share_of_time", lambda *_: 1.25)
    with caplog.at_level(logging.INFO):
        state, handed = settle(eager, toy, settled[0])
    assert (state, handed) == (ForwardState("cpu", "fp32", "eager", settled=True), [])
    assert "the forward stays eager: compiled it takes 1.25 times as long" in caplog.text


@pytest.mark.parametrize(("one", "many", "share"), [(2.0, 0.5, 1.0), (1.0, 0.25, 0.5), (1.21, 1.0, 1.1)])
def test_the_share_of_time_is_of_one_image_and_of_many(
    one: float, many: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def taking(of_one: float, of_many: float) -> Any:
        def outputs(images: torch.Tensor) -> None:
            now[0] += of_one if len(images) == 1 else of_many * len(images)

        return SimpleNamespace(outputs=outputs, backbone=SimpleNamespace(input_shape=(2, 2, 3)))

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert share_of_time(taking(one, many), taking(1.0, 1.0)) == pytest.approx(share)
    assert share_of_time(taking(one, many), taking(1.0, 1.0), lambda: True) == inf  # the server stops


@needs_compiler
def test_a_server_says_that_it_serves_eagerly_until_the_compiled_forward_is_in_force(
    settled: tuple[Path, list[Detector]], toy_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven, let_go, compiled = threading.Event(), threading.Event(), Settling._compiled

    def held(self: Settling, detector: Detector) -> Detector:
        found = compiled(self, detector)
        proven.set()
        assert let_go.wait(PATIENCE_S)
        return found

    monkeypatch.setattr(Settling, "_compiled", held)
    own = Settings(models=toy_models, state_dir=settled[0].parent, compile="auto", torch_threads=THREADS)
    with serving(own) as running:

        def forward() -> dict[str, Any]:
            found: dict[str, Any] = running.client.get("/v1/models/toy").json()["forward"]
            return found

        try:
            assert proven.wait(PATIENCE_S)
            assert forward() == {"device": "cpu", "precision": "fp32", "mode": "eager", "settled": False}
            before = post(running.client, GOOD).json()
        finally:
            let_go.set()
        wait_until(lambda: forward()["settled"])
        assert forward() == {"device": "cpu", "precision": "fp32", "mode": "compiled", "settled": True}
        assert running.context.registry.get("toy").detector.backbone.mode == "compiled"
        after = post(running.client, GOOD).json()
        assert after["decision"] == before["decision"]
        assert after["prediction"]["label"] == before["prediction"]["label"]


@needs_compiler
def test_no_tolerance_shrinks(settled: tuple[Path, list[Detector]], eager: Detector) -> None:
    before, after = (d.manifest.score_tolerance["fp32"] for d in (eager, settled[1][0]))
    assert all(after[name] >= before[name] for name in before)


@needs_compiler
def test_the_next_start_needs_no_compiler(
    settled: tuple[Path, list[Detector]], eager: Detector, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    state, handed = settle(eager, toy, settled[0])
    assert state.mode == "compiled"
    assert len(handed) == 1


@needs_compiler
def test_other_golden_answers_leave_the_eager_forward_in_force(
    settled: tuple[Path, list[Detector]], eager: Detector, toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = artifacts.load(toy)
    artifact.golden["fp32.deferred"] = ~artifact.golden["fp32.deferred"]
    artifacts.save(artifact, tmp_path / "toy" / "1")
    stays_eager(settle(eager, tmp_path / "toy" / "1", settled[0]), caplog, "another label or decision")


@needs_compiler
def test_a_damaged_library_leaves_the_eager_forward_in_force(
    settled: tuple[Path, list[Detector]], eager: Detector, toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(settled[0], tmp_path / "compile")
    (made,) = copy.iterdir()
    libraries(made)[1].write_bytes(b"\x7fELF")
    stays_eager(settle(eager, toy, copy), caplog, "cannot be loaded")
    assert not made.exists()  # so that the next start makes it again


@needs_compiler
def test_what_another_server_is_compiling_is_left_alone_and_what_nobody_finished_is_removed(
    settled: tuple[Path, list[Detector]], eager: Detector, toy: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(settled[0], tmp_path / "compile")
    (made,) = copy.iterdir()
    earlier = made.with_name(made.name[:-4] + "0000")
    others = [made.with_name(f"{made.name}.{kind}") for kind in ("partial-1", "work-a", "partial-2", "work-b")]
    for path in (earlier, *others):
        path.mkdir()
    for path in others[2:]:
        os.utime(path, (0, 0))
    assert settle(eager, toy, copy)[0].mode == "compiled"
    assert set(copy.iterdir()) == {made, *others[:2]}


def test_without_a_compiler_the_forward_stays_eager_and_one_line_says_so(
    eager: Detector, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    stays_eager(settle(eager, toy, tmp_path / "compile"), caplog, "no C++ compiler")


@needs_compiler
def test_a_compiling_process_that_fails_leaves_the_eager_forward_in_force(
    eager: Detector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stays_eager(settle(eager, tmp_path / "gone", tmp_path / "compile"), caplog, "the compiling process failed")
    assert not list((tmp_path / "compile").iterdir())


def test_code_is_not_loaded_from_a_directory_that_all_may_write(
    eager: Detector, toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    stays_eager(settle(eager, toy, tmp_path), caplog, "open to all")


@needs_compiler
def test_a_compiled_forward_that_is_needed_no_more_leaves_the_memory(
    settled: tuple[Path, list[Detector]], tmp_path: Path
) -> None:
    (made,) = shutil.copytree(settled[0], tmp_path / "compile").iterdir()
    forward = CompiledForward(libraries(made))
    forward(torch.from_numpy(toy_images(3, seed=1)[0]))
    maps = Path("/proc/self/maps")
    assert str(made) in maps.read_text()
    del forward
    assert str(made) not in maps.read_text()


@needs_compiler
def test_the_eager_forward_leaves_the_memory_when_the_compiled_one_has_taken_over(
    settled: tuple[Path, list[Detector]], toy: Path
) -> None:
    detector, handed = Detector.load(toy, device="cpu"), list[Detector]()
    backbone = weakref.ref(detector.backbone)
    settling = Settling(detector, toy, settled[0], handed.append, threads=THREADS, niceness=0)
    del detector
    settling.start()
    assert settling.wait(PATIENCE_S)
    settling.close()
    assert settling.state.mode == handed[0].backbone.mode == "compiled"
    assert backbone() is None


Endless = tuple[Path, Callable[[], list[psutil.Process]]]


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[Endless]:
    """A compiler that never ends; and what waits until it runs, and gives the process that called it, and its own."""
    fifo, compiler = tmp_path / "fifo", tmp_path / "compiler"
    os.mkfifo(fifo)
    compiler.write_text(f"#!/bin/sh\necho $PPID $$ > {fifo}\nexec sleep infinity\n")
    compiler.chmod(0o755)
    told = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    found: list[psutil.Process] = []

    def running() -> list[psutil.Process]:
        assert select.select([told], [], [], PATIENCE_S)[0]
        found.extend(psutil.Process(int(number)) for number in os.read(told, 100).split())
        assert "detector.compiling" in found[0].cmdline()
        return found

    yield compiler, running
    os.close(told)
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def test_closing_ends_the_compiling_process_and_its_compiler(
    eager: Detector,
    toy: Path,
    tmp_path: Path,
    endless: Endless,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", str(endless[0]))
    handed: list[Detector] = []
    settling = Settling(eager, toy, tmp_path / "compile", handed.append, niceness=0)
    settling.start()
    below = endless[1]()
    settling.close()
    assert not psutil.wait_procs(below, timeout=60)[1]
    assert settling.state.settled
    assert not handed
    assert not list((tmp_path / "compile").glob("*"))
    assert not caplog.records


def test_the_compiling_process_takes_no_more_than_others_leave(
    eager: Detector, toy: Path, tmp_path: Path, endless: Endless, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(endless[0]))
    settling = Settling(eager, toy, tmp_path / "compile", print)
    settling.start()
    assert [process.nice() for process in endless[1]()] == [19, 19]
    settling.close()


SERVER = """
import sys
from math import inf
from pathlib import Path

from detector import Detector
from detector.settling import Settling

model = Path(sys.argv[1])
settling = Settling(Detector.load(model, device="cpu"), model, Path(sys.argv[2]), print, niceness=0)
settling.start()
settling.wait(3600)
"""


def test_a_server_that_is_killed_leaves_neither_the_compiling_process_nor_its_compiler(
    toy: Path, tmp_path: Path, endless: Endless
) -> None:
    command = [sys.executable, "-c", SERVER, str(toy), str(tmp_path / "compile")]
    with subprocess.Popen(command, env=os.environ | {"CXX": str(endless[0])}, cwd=ROOT) as server:
        try:
            below = endless[1]()
        finally:
            server.kill()
    assert not psutil.wait_procs(below, timeout=60)[1]


@pytest.fixture
def working_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of every detector passes for one that works on its own; what is recorded there runs eagerly here."""
    monkeypatch.setattr(Detector, "asynchronous", True)
    monkeypatch.setattr("detector.settling.recorded", lambda forward, images: forward)


def record(detector: Detector, model: Path) -> tuple[ForwardState, list[Detector]]:
    handed: list[Detector] = []
    settling = Settling(detector, model, None, handed.append, record=(1, 2, 4))
    assert not settling.state.settled
    settling.start()
    assert settling.wait(PATIENCE_S)
    settling.close()
    return settling.state, handed


@pytest.mark.usefixtures("working_alone")
def test_a_device_that_works_on_its_own_gets_its_forward_recorded(eager: Detector, toy: Path) -> None:
    state, (recorded,) = record(eager, toy)
    assert state == ForwardState("cpu", "fp32", "recorded", settled=True)
    assert recorded.backbone.mode == "recorded"
    images, _ = toy_images(5, seed=21)
    torch.testing.assert_close(recorded.outputs(images).logits, eager.outputs(images).logits)


@pytest.mark.usefixtures("working_alone")
def test_a_recorded_forward_with_other_golden_answers_is_left_alone(
    eager: Detector, toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def other(forward: Any, images: torch.Tensor) -> Any:
        return lambda images: tuple(-part for part in forward(images))

    monkeypatch.setattr("detector.settling.recorded", other)
    stays_eager(record(eager, toy), caplog, "golden")


@pytest.mark.usefixtures("working_alone")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_batch_size_is_proven(
    eager: Detector, toy: Path, size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def other(forward: Any, images: torch.Tensor) -> Any:
        sign = -1 if len(images) == size else 1
        return lambda images: tuple(sign * part for part in forward(images))

    monkeypatch.setattr("detector.settling.recorded", other)
    stays_eager(record(eager, toy), caplog, "golden")


@pytest.mark.usefixtures("working_alone")
def test_a_recorded_forward_that_is_slower_is_left_alone(
    eager: Detector, toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("detector.settling.share_of_time", lambda *_: 1.25)
    with caplog.at_level(logging.INFO):
        state, handed = record(eager, toy)
    assert (state.mode, state.settled, handed) == ("eager", True, [])
    assert "recorded it takes 1.25 times as long" in caplog.text


@pytest.mark.usefixtures("working_alone")
def test_a_forward_that_cannot_be_recorded_stays_eager(
    eager: Detector, toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(forward: Any, images: torch.Tensor) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("detector.settling.recorded", refused)
    stays_eager(record(eager, toy), caplog, "operation not permitted when stream is capturing. Restart without")


@pytest.mark.usefixtures("working_alone")
def test_nothing_is_recorded_where_it_was_not_asked_for(eager: Detector, toy: Path, tmp_path: Path) -> None:
    settling = Settling(eager, toy, tmp_path, print)
    assert settling.state == ForwardState("cpu", "fp32", "eager", settled=True)
    settling.close()


@pytest.mark.usefixtures("working_alone")
def test_a_server_that_is_told_to_records_the_forward(toy_models: Path) -> None:
    with serving(Settings(models=toy_models, cuda_graphs=True, max_batch=2)) as running:
        client = running.client
        assert running.context.registry._settling["toy"].wait(PATIENCE_S)
        wait_until(lambda: client.get("/v1/models/toy").json()["forward"]["settled"])
        assert client.get("/v1/models/toy").json()["forward"]["mode"] == "recorded"
        assert post(client, GOOD).status_code == 200
        assert 'oodgate_forward_compiled{model="toy",version="1"} 1.0' in client.get("/metrics").text


def test_a_torch_that_does_not_know_the_processor_compiles_nothing(
    eager: Detector, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    stays_eager(settle(eager, toy, tmp_path / "compile"), caplog, "from torch 2.12 on")


def test_without_a_directory_the_forward_is_settled_at_once(eager: Detector, toy: Path) -> None:
    handed: list[Detector] = []
    settling = Settling(eager, toy, None, handed.append)
    settling.start()
    assert settling.wait(0)
    assert settling.state == ForwardState("cpu", "fp32", "eager", settled=True)
    settling.close()


def stays_eager(found: tuple[ForwardState, list[Detector]], caplog: pytest.LogCaptureFixture, reason: str) -> None:
    state, handed = found
    assert state == ForwardState("cpu", "fp32", "eager", settled=True)
    assert not handed
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the forward stays eager" in line.getMessage()
    assert reason in line.getMessage()
