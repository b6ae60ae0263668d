# SPDX-License-Identifier: Apache-2.0
"""Time from starting `oodgate serve` to its first ready answer, its memory then, and after a load; five runs.

python -m benchmarks.start_up
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.serving.results import processor

RESULT, IMAGE = Path("benchmarks/results/start_up.json"), Path("examples/cat.png")
RUNS, POLL_S, LIMIT_S = 5, 0.02, 120.0
IMAGES, CALLERS = 2_000, 32


def once(port: int) -> tuple[float, int, int]:
    """Seconds to ready, and resident bytes then and after a load, all eager."""
    started = time.monotonic()
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--log-level", "ERROR"]
    process = subprocess.Popen(command, env=os.environ | {"OODGATE_COMPILE": "off"})
    pause = threading.Event()
    try:
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() - started > LIMIT_S:
                raise RuntimeError("the server did not become ready")
            pause.wait(POLL_S)
        seconds = time.monotonic() - started
        when_ready = resident_bytes(process.pid)
        with ThreadPoolExecutor(CALLERS) as callers:
            list(callers.map(lambda _: ask(port), range(IMAGES)))
        return seconds, when_ready, resident_bytes(process.pid)
    finally:
        process.terminate()
        process.wait()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def ask(port: int) -> None:
    """Get one verdict."""
    address = f"http://127.0.0.1:{port}/v1/verdict"
    asked = urllib.request.Request(address, IMAGE.read_bytes(), {"content-type": "image/png"})
    with urllib.request.urlopen(asked, timeout=LIMIT_S) as answer:
        answer.read()


def is_ready(port: int) -> bool:
    """Whether a server on this port says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    runs = [once(port) for _ in range(RUNS)]
    seconds, when_ready, after_load = (sorted(figures) for figures in zip(*runs, strict=True))
    result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "seconds_to_ready": [round(each, 2) for each in seconds],
        "resident_mb": [round(each / 1e6) for each in when_ready],
        "resident_mb_after_2000_images": [round(each / 1e6) for each in after_load],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
