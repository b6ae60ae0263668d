# SPDX-License-Identifier: Apache-2.0
"""Post real images to a real server and count its decisions; scores and decisions are read from its answers alone.

python -m benchmarks.cifar10.over_http
"""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.datasets import FAR_OOD, NEAR_OOD, Images, load
from benchmarks.start_up import POLL_S, is_ready
from detector.calibration import clopper_pearson
from detector.evaluation import auroc

RESULT = Path("benchmarks/results/over_http.json")
PER_REQUEST = 50


def ask(client: httpx.Client, images: Images) -> list[dict[str, Any]]:
    """One verdict an image, as the server gave them."""
    verdicts: list[dict[str, Any]] = []
    for start in range(0, len(images), PER_REQUEST):
        files = []
        for index, image in enumerate(images[start : start + PER_REQUEST]):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            files.append(("file", (f"{index}.png", buffer.getvalue())))
        verdicts += client.post("/v1/verdict", files=files).raise_for_status().json()["verdicts"]
    return verdicts


def measure(client: httpx.Client) -> dict[str, Any]:
    """Deferral by set, and AUROC against the in-distribution test images."""
    known = ask(client, load("cifar10-test")[0])
    id_scores = np.array([verdict["ood"]["score"] for verdict in known])
    accepted = sum(verdict["decision"] == "accept" for verdict in known)
    sets = {}
    for name in (*NEAR_OOD, *FAR_OOD):
        verdicts = ask(client, load(name)[0])
        scores = np.array([verdict["ood"]["score"] for verdict in verdicts])
        deferred = np.mean([verdict["decision"] == "defer" for verdict in verdicts])
        sets[name] = {"n": len(verdicts), "deferral": float(deferred), "auroc": auroc(id_scores, scores)}
    return {
        "model_digest": known[0]["model"]["digest"],
        "id": {
            "n": len(known),
            "acceptance": accepted / len(known),
            "acceptance_interval": clopper_pearson(accepted, len(known)),
            "promised": client.get("/v1/models/cifar10").json()["calibration"]["expected_acceptance_interval"],
        },
        "ood": sets,
    }


def table(result: dict[str, Any]) -> str:
    known = result["id"]
    low, high = known["acceptance_interval"]
    first, last = known["promised"]
    lines = [
        f"CIFAR-10 test images: {known['n']:,}, accepted {known['acceptance']:.2%} "
        f"(95 % interval {low:.2%} to {high:.2%}); the calibration promises {first:.2%} to {last:.2%}",
        f"{'OOD set':16}{'images':>8}{'deferred':>10}{'AUROC':>9}",
    ]
    for name, row in result["ood"].items():
        lines.append(f"{name:16}{row['n']:>8,}{row['deferral']:>10.1%}{row['auroc']:>9.2%}")
    return "\n".join(lines)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "service", "serve", "--port", str(port), "--log-level", "ERROR"])
    pause = threading.Event()
    try:
        while not is_ready(port):
            if server.poll() is not None:
                raise RuntimeError("the server did not start")
            pause.wait(POLL_S)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            result = measure(client)
    finally:
        server.terminate()
        server.wait()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(result) + "\n")


if __name__ == "__main__":
    main()
