# SPDX-License-Identifier: Apache-2.0
"""What every peer serves: the network, weights and preprocessing of an oodgate artifact, prediction only.

A peer's process is told by its environment: BENCH_ARTIFACT (a model directory), BENCH_PRECISION (fp32 or bf16),
BENCH_THREADS (of one forward pass), BENCH_PORT.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from detector import artifact as artifacts
from detector.images import Pixels, decode
from detector.networks import build, load_export

MAX_BATCH, WINDOW_S = 16, 0.01  # of every peer whose batcher takes them; the window stands in their documentation
PORT = int(os.environ.get("BENCH_PORT", "8000"))
PREPROCESS_PROCESSES = os.cpu_count() or 1


class Classifier:
    """The bare network: uint8 images -> logits.

    Args:
        directory: a model directory.
        precision: fp32, or bf16 weights and activations.
        threads: of one forward pass.
    """

    def __init__(self, directory: Path, precision: str, threads: int) -> None:
        torch.set_num_threads(threads)
        artifact = artifacts.load(directory)
        manifest = artifact.manifest
        if artifact.export is not None:
            module = load_export(artifact.export, artifacts.EXPORT)
        else:
            module = build(manifest.network)
            module.load_state_dict(artifact.weights or {})
        module.train(False)
        self.module: Any = module.requires_grad_(False)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        cast(Any, module).to(dtype=self.dtype, memory_format=torch.channels_last)
        self.preprocessing, self.class_names = manifest.preprocessing, manifest.class_names
        self._mean, self._std = (
            torch.tensor([self.preprocessing.mean, self.preprocessing.std]).mul(255).view(2, 3, 1, 1)
        )

    @classmethod
    def from_environment(cls) -> Classifier:
        """The classifier that this process was told to serve."""
        told = os.environ
        return cls(Path(told["BENCH_ARTIFACT"]), told["BENCH_PRECISION"], int(told["BENCH_THREADS"]))

    def decode(self, data: bytes) -> Pixels:
        """One encoded image as the network takes it: uint8 [H, W, 3]."""
        return decode(data, self.preprocessing)

    def logits(self, images: Sequence[Pixels]) -> Tensor:
        """float32 [N, C] from decoded images."""
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits: Tensor = self.module(((pixels.float() - self._mean) / self._std).to(self.dtype))
            return logits.float()

    def classify(self, images: Sequence[Pixels]) -> list[dict[str, Any]]:
        """The answers to decoded images: index, label and confidence of each."""
        confidence, index = self.logits(images).softmax(1).max(1)
        pairs = zip(index.tolist(), confidence.tolist(), strict=True)
        return [{"index": i, "label": self.class_names[i], "confidence": value} for i, value in pairs]

    def warm(self) -> None:
        """Run the smallest and the largest batch once."""
        blank = np.zeros((*self.preprocessing.crop, 3), np.uint8)
        for size in (1, MAX_BATCH):
            self.classify([blank] * size)
