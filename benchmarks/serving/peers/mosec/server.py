# SPDX-License-Identifier: Apache-2.0
"""mosec as in its ResNet example: a stage of decoding processes, then a batched inference process.

python -m benchmarks.serving.peers.mosec.server --port PORT
"""

import os
from pathlib import Path
from typing import Any

from mosec import Server, Worker

from benchmarks.serving.peers.classifier import MAX_BATCH, PREPROCESS_PROCESSES, WINDOW_S, Classifier
from detector.artifact import read_manifest
from detector.images import decode


class Preprocess(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = read_manifest(Path(os.environ["BENCH_ARTIFACT"])).preprocessing

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> Any:
        return decode(data, self.preprocessing)


class Inference(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = Classifier.from_environment()
        self.classifier.warm()

    def forward(self, data: list[Any]) -> list[dict[str, Any]]:
        return self.classifier.classify(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Preprocess, num=PREPROCESS_PROCESSES)
    server.append_worker(Inference, num=1, max_batch_size=MAX_BATCH, max_wait_time=int(1000 * WINDOW_S))
    server.run()
