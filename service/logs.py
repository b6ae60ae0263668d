# SPDX-License-Identifier: Apache-2.0
"""JSON log lines on stdout."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any, TextIO

import orjson
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter


class Access:
    """One line a request, straight to the stream: a log record would cost more than the answer to a small image.

    Lines are handed to the system at the end of the event loop's turn: under overload a turn has many.
    """

    def __init__(self) -> None:
        self._stream: TextIO | None = None
        self._level = logging.CRITICAL
        self._lines: list[bytes] = []

    def to(self, stream: TextIO, level: int) -> None:
        """Write lines of this level and above to this stream from now on."""
        self._stream, self._level = stream, level

    def write(self, level: int, record: dict[str, Any]) -> None:
        """Write what happened to a request, on the event loop; to the logger `service.access` without a stream."""
        if self._stream is None:
            logging.getLogger("service.access").log(level, "request", extra=record)
        elif level >= self._level:
            now = time.time()
            stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}.{int(now % 1 * 1000):03d}"
            head = {
                "time": stamp,
                "level": logging.getLevelName(level),
                "logger": "service.access",
                "message": "request",
            }
            if not self._lines:
                asyncio.get_running_loop().call_soon(self._flush, self._stream)
            self._lines.append(orjson.dumps(head | record, option=orjson.OPT_APPEND_NEWLINE))

    def _flush(self, stream: TextIO) -> None:
        lines, self._lines = self._lines, []
        stream.write(b"".join(lines).decode())
        stream.flush()


access = Access()


def configure(level: str) -> None:
    """Send every logger's records to stdout as JSON, one object a line."""
    access.to(sys.stdout, logging.getLevelNamesMapping()[level])
    handler = logging.StreamHandler(sys.stdout)
    names = {"levelname": "level", "name": "logger", "asctime": "time"}
    formatter = JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s",
        rename_fields=names,
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn repeats its messages with terminal colours
    )
    formatter.default_msec_format = "%s.%03d"
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def told_once() -> None:
    """Keep uvicorn from repeating, with a traceback, an error at start that was told in one line."""
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.levelno < logging.ERROR)
