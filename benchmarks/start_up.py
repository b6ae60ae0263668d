# SPDX-License-Identifier: Apache-2.0
"""Time from starting `oodgate serve` to its first ready answer, and its memory then; five runs.

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
from pathlib import Path
from statistics import median

import torch

from benchmarks.serving.results import processor

RESULT = Path("benchmarks/results/start_up.json")
RUNS, POLL_S, LIMIT_S = 5, 0.02, 120.0


def once(port: int) -> tuple[float, int]:
    """Seconds to ready, and resident bytes then."""
    started = time.monotonic()
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--log-level", "ERROR"]
    process = subprocess.Popen(command)
    pause = threading.Event()
    try:
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() - started > LIMIT_S:
                raise RuntimeError("the server did not become ready")
            pause.wait(POLL_S)
        seconds = time.monotonic() - started
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        return seconds, pages * os.sysconf("SC_PAGE_SIZE")
    finally:
        process.terminate()
        process.wait()


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
    seconds = sorted(run[0] for run in runs)
    result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "seconds_to_ready": {"min": seconds[0], "median": median(seconds), "max": seconds[-1]},
        "resident_mb": round(median(run[1] for run in runs) / 1e6),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
