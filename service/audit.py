# SPDX-License-Identifier: Apache-2.0
"""The audit log: one JSON line a decision and a change, never the image.

A thread of its own hands what has come to the operating system, fifty times a second at most, so that a killed process
loses the lines of its last instant; `fsync` follows at most a second later, so that the end of the machine loses a
second. Control characters are escaped by JSON: no input can forge a line.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from service.errors import StateUnwritable
from service.state import PRIVATE, make_folder

log = logging.getLogger(__name__)

FILE = "audit.jsonl"
MOST_WAITING = 100_000  # lines; more are lost, counted and told in the log
SYNC_S = 1.0
GATHER_S = 0.02  # to wake for every line would cost each request more than its line does


class Audit:
    """An append-only log that rotates by size.

    Args:
        directory: where `audit.jsonl` and its predecessors `audit.jsonl.1` (the youngest) … lie.
        max_bytes: size after which a file is set aside.
        keep: how many are kept beside the one that is written.
        on_loss: told how many lines were lost.

    Raises:
        StateUnwritable: the directory cannot be written.
    """

    def __init__(
        self, directory: Path, *, max_bytes: int, keep: int, on_loss: Callable[[int], None] = lambda lines: None
    ) -> None:
        self._path, self._max_bytes, self._keep, self._on_loss = directory / FILE, max_bytes, keep, on_loss
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._cut = False  # in the middle of the last line
        self._lost = 0
        try:
            make_folder(directory)
            self._file = self._opened()
            self._end_the_last_line()
        except OSError as error:
            raise StateUnwritable(self._path, error) from error
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line, stamped with the time; returns at once."""
        line = orjson.dumps({"time": round(time.time(), 6), **record}) + b"\n"
        with self._changed:
            if self._closing or len(self._lines) >= MOST_WAITING:
                self._lost += 1
                return
            self._lines.append(line)
            if len(self._lines) == 1:
                self._changed.notify()

    def close(self) -> None:
        """Write and sync what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _opened(self) -> FileIO:
        self._path.touch(PRIVATE)
        return self._path.open("ab", buffering=0)

    def _end_the_last_line(self) -> None:
        """A crash may have cut it short; the next line must not be lost to it."""
        if self._file.tell():
            with self._path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    self._file.write(b"\n")

    def _run(self) -> None:
        synced = time.monotonic()
        dirty = False
        while True:
            with self._changed:
                while not self._lines and not self._closing:
                    left = synced + SYNC_S - time.monotonic()
                    if dirty and left <= 0:
                        break
                    self._changed.wait(left if dirty else None)
                self._changed.wait_for(lambda: self._closing, GATHER_S if self._lines else 0)
                lines, self._lines = self._lines, deque()
                lost, self._lost = self._lost, 0
                closing = self._closing
            if lost:
                log.error("audit lines were lost: the disk is too slow", extra={"lines": lost})
                self._on_loss(lost)
            dirty = self._append(lines) or dirty
            if dirty and (closing or time.monotonic() - synced >= SYNC_S):
                self._sync()
                synced, dirty = time.monotonic(), False
            if closing:
                self._file.close()
                return

    def _append(self, lines: deque[bytes]) -> bool:
        """Whether anything was written."""
        if not lines:
            return False
        batch, written = b"".join(lines), 0
        try:
            if self._cut:
                self._file.write(b"\n")
                self._cut = False
            if self._file.tell() >= self._max_bytes:
                self._rotate()
            while written < len(batch):
                written += self._file.write(memoryview(batch)[written:])
        except OSError as error:
            lost = len(lines) - batch.count(b"\n", 0, written)  # a disk that fills up takes a part
            self._cut |= written > 0 and not batch.endswith(b"\n", 0, written)
            log.error("the audit log cannot be written", exc_info=error, extra={"lines": lost})
            self._on_loss(lost)
        return written > 0

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            log.error("the audit log cannot be synced; what was written may not outlive the machine", exc_info=error)

    def _rotate(self) -> None:
        self._sync()
        if self._path.exists():  # else the last time got no further: what was set aside then must not move on
            for number in range(self._keep, 0, -1):
                older = self._path.with_name(f"{FILE}.{number}")
                if older.exists():
                    older.replace(self._path.with_name(f"{FILE}.{number + 1}"))
            self._path.with_name(f"{FILE}.{self._keep + 1}").unlink(missing_ok=True)
            self._path.replace(self._path.with_name(f"{FILE}.1"))
        fresh = self._opened()
        self._file.close()  # not before its successor is there: a failure leaves a file to write to
        self._file = fresh


class NoAudit:
    """Stands where an audit log would be, where none is wanted."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
