# SPDX-License-Identifier: Apache-2.0
"""What each score adds to the forward pass of the default model at batch 32, interleaved, as a share of the forward,
in each precision.

    python -m benchmarks.score_cost

Writes benchmarks/results/score_cost.json, the medians over rounds of a forward and every score, and the table in
docs/performance.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.readme import replaced
from detector import Detector
from detector.artifact import read_manifest
from detector.backbone import Outputs
from detector.scores import score_all

MODEL, RESULT = Path("models/cifar10/1"), Path("benchmarks/results/score_cost.json")
DOCUMENT = Path("docs/performance.md")
BATCH, ROUNDS, WARM = 32, 40, 5


def main() -> None:
    manifest = read_manifest(MODEL)
    result: dict[str, Any] = {
        "model": manifest.model_digest,
        "batch": BATCH,
        "rounds": ROUNDS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{precision: _shares(Detector.load(MODEL, precision=precision)) for precision in manifest.precisions},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    written = table(result)
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), "scores", written))
    print(written)


def table(result: Mapping[str, Any]) -> str:
    """The stored result as a Markdown table, the dearest score first."""
    precisions = [name for name in ("fp32", "bf16") if name in result]
    shares = [result[name]["share_of_forward"] for name in precisions]
    forwards = " and ".join(f"{result[name]['forward_ms']:.1f} ms in {name}" for name in precisions)
    return "\n".join(
        [
            f"| score | {' | '.join(f'share of the {name} forward' for name in precisions)} |",
            "|---|" + "---:|" * len(precisions),
            *(f"| `{score}` | {' | '.join(f'{100 * each[score]:.1f} %' for each in shares)} |" for score in shares[0]),
            "",
            f"Median of {result['rounds']} rounds, a batch of {result['batch']}; the forward takes {forwards}. "
            f"torch {result['torch']}, {result['threads']} threads, model `{result['model']}`.",
            "",
        ]
    )


def _shares(detector: Detector) -> dict[str, Any]:
    images = torch.randint(0, 256, (BATCH, *detector.backbone.input_shape), dtype=torch.uint8)
    outputs = detector.backbone.outputs(images)
    rounds = [_round(detector, images, outputs) for _ in range(WARM + ROUNDS)][WARM:]
    forward = [one.pop("forward") for one in rounds]
    shares = {
        name: statistics.median(one[name] / whole for one, whole in zip(rounds, forward, strict=True))
        for name in rounds[0]
    }
    return {
        "forward_ms": 1e3 * statistics.median(forward),
        "share_of_forward": dict(sorted(shares.items(), key=lambda item: -item[1])),
    }


def _round(detector: Detector, images: torch.Tensor, outputs: Outputs) -> dict[str, float]:
    seconds = {"forward": _seconds(lambda: detector.backbone.outputs(images))}
    for name in detector.scores_without_backward:
        seconds[name] = _seconds(partial(score_all, detector.fitted, [name], outputs))
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
