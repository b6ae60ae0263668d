# SPDX-License-Identifier: Apache-2.0
"""JSON log lines on stdout."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter


def configure(level: str) -> None:
    """Send every logger's records to stdout as JSON, one object a line."""
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
