# SPDX-License-Identifier: Apache-2.0
"""Write into README.md what the commands in it really answer, and the table that `make bench` measured.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

from benchmarks.accuracy.marks import label
from benchmarks.start_up import POLL_S, is_ready
from detector.artifact import read_manifest
from detector.evaluation import table

README, MODEL = Path("README.md"), Path("models/cifar10/1")


def results() -> str:
    """The table of the deciding score, from the model's stored report; with its mark, where it has one."""
    report = json.loads((MODEL / "report.json").read_text())
    score = read_manifest(MODEL).policy.score_name
    return table(report, score).replace(f"`{score}`", label(score, "embedded"))


def answer() -> str:
    """What a server says to the README's first curl."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "service", "serve", "--port", str(port), "--log-level", "ERROR"])
    try:
        pause = threading.Event()
        while not is_ready(port):
            if server.poll() is not None:
                raise RuntimeError("the server did not start")
            pause.wait(POLL_S)
        command = next(line for line in README.read_text().splitlines() if line.startswith("curl --data-binary"))
        done = subprocess.run(["sh", "-c", command.replace(":8000", f":{port}")], capture_output=True, check=True)
    finally:
        server.terminate()
        server.wait()
    return f"```json\n{json.dumps(json.loads(done.stdout), indent=1)}\n```"


def replaced(text: str, marker: str, content: str) -> str:
    """The text with what stands between two markers replaced."""
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)


def main() -> None:
    text = replaced(README.read_text(), "results", results())
    README.write_text(replaced(text, "answer", answer()))


if __name__ == "__main__":
    main()
