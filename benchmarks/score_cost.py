# SPDX-License-Identifier: Apache-2.0
"""What each score adds to the forward pass of the default model at batch 32, interleaved, as a share of the forward,
in each precision.

    python -m benchmarks.score_cost

Writes benchmarks/results/score_cost.json, the medians over rounds of a forward and every score, and the table in
docs/performance.md.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.readme import replaced
from benchmarks.serving.results import processor
from detector import Detector
from detector.artifact import read_manifest
from detector.backbone import Precision
from detector.features import bind
from detector.machine import fast_in_bfloat16
from detector.outputs import Outputs
from detector.scores import FitOptions, score_all

MODEL, RESULT = Path("models/cifar10/1"), Path("benchmarks/results/score_cost.json")
DOCUMENT = Path("docs/performance.md")
BATCH, ROUNDS, WARM = 32, 40, 5
DEFAULT_BANK = FitOptions(num_classes=1).bank_size or 0


def main() -> None:
    manifest = read_manifest(MODEL)
    result: dict[str, Any] = {
        "model": manifest.model_digest,
        "batch": BATCH,
        "rounds": ROUNDS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "bank": len(_banks(Detector.load(MODEL))["knn"]),
        "default_bank": DEFAULT_BANK,
        **{
            precision: _both(Detector.load(MODEL, precision=precision))
            for precision in _not_emulated(manifest.precisions)
        },
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    written = table(result)
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), "scores", written))
    print(written)


def _not_emulated(precisions: Sequence[Precision]) -> list[Precision]:
    """Without bf16 where it is emulated: a share of such a forward says nothing."""
    able = fast_in_bfloat16(torch.device("cpu"))
    return [precision for precision in precisions if able or precision != "bf16"]


def table(result: Mapping[str, Any]) -> str:
    """The stored result as a Markdown table, the dearest score first."""
    precisions = [name for name in ("fp32", "bf16") if name in result]
    kinds = (("share_of_forward", result["bank"]), ("share_with_default_bank", result["default_bank"]))
    columns = [(f"{name}, bank of {bank:,}", result[name][kind]) for name in precisions for kind, bank in kinds]

    def row(score: str) -> str:
        cells = [f"{100 * shares[score]:.1f} %" if score in shares else "" for _, shares in columns]
        return f"| `{score}` | {' | '.join(cells)} |"

    forwards = " and ".join(f"{result[name]['forward_ms']:.1f} ms in {name}" for name in precisions)
    return "\n".join(
        [
            f"| share of the forward | {' | '.join(title for title, _ in columns)} |",
            "|---|" + "---:|" * len(columns),
            *map(row, columns[0][1]),
            "",
            f"Median of {result['rounds']} rounds, a batch of {result['batch']}; the forward takes {forwards}. "
            f"{result['processor']}, torch {result['torch']}, {result['threads']} threads, load average "
            f"{result['load_at_start']} at the start, model `{result['model']}`.",
            "",
        ]
    )


def _both(detector: Detector) -> dict[str, Any]:
    """Shares with the banks as they are, then with those of a fit by default."""
    as_served = _shares(detector, detector.scores_without_backward)
    banks = _banks(detector)
    generator = torch.Generator().manual_seed(0)
    for name, bank in banks.items():
        rows = bank[torch.randint(0, len(bank), (DEFAULT_BANK,), generator=generator)]
        # Copies of a row would all be as near as the nearest, and each be measured again.
        noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        state = detector.fitted[name].state() | {"bank": rows + 0.1 * rows.std() * noise}
        detector.fitted[name] = type(detector.fitted[name]).from_state(state, detector.backbone)  # type: ignore[index]
    bind(detector.fitted)
    larger = _shares(detector, [*banks, *(name for name, score in detector.fitted.items() if score.members)])
    return as_served | {"share_with_default_bank": larger["share_of_forward"]}


def _banks(detector: Detector) -> dict[str, torch.Tensor]:
    states = {name: score.state() for name, score in detector.fitted.items()}
    return {name: state["bank"] for name, state in states.items() if "bank" in state}


def _shares(detector: Detector, names: Sequence[str]) -> dict[str, Any]:
    images = torch.randint(0, 256, (BATCH, *detector.backbone.input_shape), dtype=torch.uint8)
    outputs = detector.backbone.outputs(images)
    rounds = [_round(detector, names, images, outputs) for _ in range(WARM + ROUNDS)][WARM:]
    forward = [one.pop("forward") for one in rounds]
    shares = {
        name: statistics.median(one[name] / whole for one, whole in zip(rounds, forward, strict=True))
        for name in rounds[0]
    }
    return {
        "forward_ms": 1e3 * statistics.median(forward),
        "share_of_forward": dict(sorted(shares.items(), key=lambda item: -item[1])),
    }


def _round(detector: Detector, names: Sequence[str], images: torch.Tensor, outputs: Outputs) -> dict[str, float]:
    seconds = {"forward": _seconds(lambda: detector.backbone.outputs(images))}
    with detector.scoring_threads():
        for name in names:
            seconds[name] = _seconds(partial(score_all, detector.fitted, [name], outputs))
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
