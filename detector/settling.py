# SPDX-License-Identifier: Apache-2.0
"""Serve eagerly at once, and change to a faster form of the forward when it is proven.

A thread waits for the compiling process and loads what it made, or on a CUDA device records the forward as graphs;
proves the form on the golden inputs; and hands over a detector if it is the faster one. Whatever fails leaves the eager
forward in force, with one line in the log that says why.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import geometric_mean, median

import torch

from detector import artifact as artifacts, compiling
from detector.backbone import Mode, Precision
from detector.compiled import CompiledForward
from detector.compiling import Job, measured_moves
from detector.detector import Detector
from detector.errors import BackboneError, OodgateError
from detector.machine import own_threads
from detector.outputs import BATCH
from detector.recording import Bucketed, recorded

log = logging.getLogger(__name__)

ROUNDS, WORTHWHILE = 9, 0.95  # share of the eager forward's time; the weights stand in memory three times more
LIMIT_S = 7200.0  # on a busy machine the compiling process gets what is left; past this it is given up


@dataclass(frozen=True)
class ForwardState:
    """Which forward is in force; `settled` once it stays so."""

    device: str
    precision: Precision
    mode: Mode
    settled: bool


class Settling:
    """The way of one served model from its eager forward to its compiled or recorded one.

    Args:
        detector: the model as it serves now.
        model: its directory.
        directory: where compiled forwards are kept between starts; None compiles nothing, nor does a CUDA device.
        record: batch sizes for which a CUDA device records its forward as CUDA graphs; none records nothing.
        hand_over: told, once and on another thread, of the detector that is to serve from now on.
        threads: of torch where the model serves; as many as this thread has where None.
        niceness: of the compiling process; 19 takes only what the server leaves.
    """

    def __init__(
        self,
        detector: Detector,
        model: Path,
        directory: Path | None,
        hand_over: Callable[[Detector], None],
        *,
        record: Sequence[int] = (),
        threads: int | None = None,
        niceness: int = 19,
    ) -> None:
        self._model = model
        self._threads = threads or torch.get_num_threads()
        self._directory = None if directory is None else directory.absolute()  # the compiler runs elsewhere
        self._niceness = niceness
        backbone = detector.backbone
        self._record = record
        wanted = bool(record) if detector.asynchronous else directory is not None
        self._state = ForwardState(str(backbone.device), backbone.precision, backbone.mode, settled=not wanted)
        self._done = threading.Event()
        self._lock = threading.Lock()  # between `close` and the start of the compiling process
        self._closed = False
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        if wanted:  # nobody but the thread holds the eager detector, whose weights leave the memory once it has settled
            arguments = detector, hand_over
            self._thread = threading.Thread(target=self._settle, args=arguments, name="settling", daemon=True)
        else:
            self._done.set()

    @property
    def state(self) -> ForwardState:
        """Which forward is in force now."""
        return self._state

    def start(self) -> None:
        """Begin, on a thread of its own."""
        if self._thread is not None:
            self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the forward has settled within so many seconds."""
        return self._done.wait(timeout_s)

    def close(self) -> None:
        """Give up what has not settled, and end the compiling process."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill(self._process)
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _settle(self, eager: Detector, hand_over: Callable[[Detector], None]) -> None:
        told = {"model": eager.manifest.name, "version": eager.manifest.version}
        mode = self._state.mode
        own_threads(self._threads)
        try:
            detector = self._recorded(eager) if eager.asynchronous else self._compiled(eager)
            if self._closed:
                return
            share = share_of_time(detector, eager, lambda: self._closed)
            if share == inf or self._closed:
                return
            if share > WORTHWHILE:
                form = detector.backbone.mode
                log.info("the forward stays eager: %s it takes %.2f times as long", form, share, extra=told)
                return
            hand_over(detector)
            mode = detector.backbone.mode
            log.info("the %s forward serves", mode, extra=told)
        except (OodgateError, OSError, ValueError) as error:
            if not self._closed:
                log.warning("the forward stays eager: %s", error, extra=told)
        except Exception:
            log.exception("the forward stays eager", extra=told)
        finally:
            self._state = replace(self._state, mode=mode, settled=True)
            self._done.set()

    def _compiled(self, eager: Detector) -> Detector:
        manifest, precision = eager.manifest, eager.backbone.precision
        if self._directory is None:
            raise AssertionError("nothing is compiled without a directory")
        _make_private(self._directory)
        family = f"{manifest.name}-{precision}-"
        out = self._directory / f"{family}{compiling.key(manifest, precision, self._threads)}"
        if not out.is_dir():
            self._compile(
                Job(model=self._model, precision=precision, threads=self._threads, out=out, niceness=self._niceness)
            )
        for other in self._directory.glob(f"{family}*"):
            unfinished = "." in other.name.removeprefix(family)
            if other != out and not (unfinished and _may_be_made_now(other)):
                shutil.rmtree(other, ignore_errors=True)  # of an earlier version, or another torch
        try:
            forward, moves = CompiledForward(compiling.libraries(out), self._threads), compiling.moves(out)
        except (BackboneError, OSError, ValueError):
            shutil.rmtree(out)  # damaged: the next start makes it again
            raise
        detector = eager.with_forward(forward, moves)
        detector.self_test(artifacts.load(self._model).golden)
        return detector

    def _recorded(self, eager: Detector) -> Detector:
        if eager.backbone.runs_whole:
            raise BackboneError("torch.fx cannot trace the network, and with hooks on it nothing is recorded")
        forward = Bucketed(eager.backbone.forward, recorded)
        unproven = eager.with_forward(forward, {}, "recorded")
        golden = artifacts.load(self._model).golden
        moved = []
        try:
            for size in self._record:
                again = torch.arange(min(size, BATCH)) % len(golden["images"])
                unproven.self_test({name: stored[again] for name, stored in golden.items()})
                moved.append(measured_moves(eager, unproven, size))
        except RuntimeError as error:  # of torch; what it leaves of the device's memory then may not all be used again
            raise BackboneError(f"it cannot be recorded: {error}. Restart without OODGATE_CUDA_GRAPHS") from error
        return eager.with_forward(forward, compiling.largest(moved), "recorded")

    def _compile(self, job: Job) -> None:
        found = compiler()
        if found is None:
            raise BackboneError("there is no C++ compiler (CXX, g++ or clang++)")
        with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=f"{job.out.name}.work-") as work, _pipe() as alive:
            scratch = {"CXX": found, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": work, "TMPDIR": work}
            with self._lock:
                if self._closed:
                    raise BackboneError("closed before it was compiled")
                self._process = subprocess.Popen(
                    [sys.executable, "-m", compiling.__name__, job.model_dump_json()],
                    env=os.environ | scratch,
                    stdin=alive,  # at its end, which also comes when this process is killed, the job ends
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    process_group=0,  # so that the compiler it runs ends with it
                )
            with self._process:
                try:
                    _, complaint = self._process.communicate(timeout=LIMIT_S)
                except subprocess.TimeoutExpired as error:
                    _kill(self._process)
                    raise BackboneError(f"the compiling process took more than {LIMIT_S:.0f} s") from error
                finally:
                    shutil.rmtree(compiling.partial(job, self._process.pid), ignore_errors=True)  # if it was killed
        if self._process.returncode:
            last = (complaint.strip().splitlines() or ["it said nothing"])[-1]
            raise BackboneError(f"the compiling process failed ({self._process.returncode}): {last}")


def share_of_time(other: Detector, eager: Detector, given_up: Callable[[], bool] = lambda: False) -> float:
    """The time of one forward over that of the other: the geometric mean for one image and for many, taken in turn.

    Infinite where it was given up.
    """
    shares = []
    for size in (1, max(compiling.SIZES)):
        images = torch.zeros(size, *eager.backbone.input_shape, dtype=torch.uint8)
        rounds = []
        for _ in range(1 + ROUNDS):
            if given_up():
                return inf
            rounds.append([_seconds(detector, images) for detector in (other, eager)])
        shares.append(median(first / second for first, second in rounds[1:]))  # the first finds cold caches
    return geometric_mean(shares)


def _seconds(detector: Detector, images: torch.Tensor) -> float:
    started = time.perf_counter()
    detector.outputs(images)
    return time.perf_counter() - started


@contextmanager
def _pipe() -> Iterator[int]:
    """The reading end of a pipe that is open as long as the block, or this process, lasts."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.killpg(process.pid, signal.SIGKILL)


def _may_be_made_now(unfinished: Path) -> bool:
    """Whether another server that keeps its compiled forwards here may be at it still."""
    try:
        return time.time() - unfinished.stat().st_mtime < LIMIT_S
    except FileNotFoundError:  # it has just finished
        return True


def compiler() -> str | None:
    """The C++ compiler that torch can use: CXX where it is set, else g++ or clang++; None where there is none."""
    named = os.environ.get("CXX")
    candidates = (named,) if named else ("g++", "clang++")
    return next((found for name in candidates if (found := shutil.which(name))), None)


def _make_private(directory: Path) -> None:
    """Make the directory; code is loaded from it, so nobody else may write there.

    Raises:
        BackboneError: it belongs to another user, or all may write to it.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    seen = directory.stat()
    if seen.st_uid != os.geteuid() or seen.st_mode & 0o002:
        raise BackboneError(f"{directory} belongs to another user or is open to all; code is never loaded from there")
