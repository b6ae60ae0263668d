# SPDX-License-Identifier: Apache-2.0
"""BentoML with adaptive batching: one batchable API that takes images, its window and latency target by default.

bentoml serve benchmarks.serving.peers.bentoml.server:Classify
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bentoml
from PIL.Image import Image

from benchmarks.serving.peers.classifier import MAX_BATCH, Classifier


@bentoml.service(workers=1, traffic={"timeout": 120})
class Classify:
    def __init__(self) -> None:
        self.classifier = Classifier.from_environment()
        self.classifier.warm()
        self.pool = ThreadPoolExecutor(os.cpu_count())

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def predict(self, images: list[Image]) -> list[dict[str, Any]]:
        return self.classifier.classify(list(self.pool.map(self._decode, images)))

    def _decode(self, image: Image) -> Any:
        # Pillow has read the header only: the pixels come from the same decoder as everybody's.
        file: Any = getattr(image, "fp")  # noqa: B009
        file.seek(0)
        return self.classifier.decode(file.read())
