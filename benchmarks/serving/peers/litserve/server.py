# SPDX-License-Identifier: Apache-2.0
"""LitServe as in its own image benchmark: batched, images decoded by a thread pool inside `batch`, ZeroMQ queues.

python -m benchmarks.serving.peers.litserve.server
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import litserve
from fastapi import Body

from benchmarks.serving.peers.classifier import MAX_BATCH, PORT, WINDOW_S, Classifier


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier.from_environment()
        self.classifier.warm()
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[Any]:
        return list(self.pool.map(self.classifier.decode, inputs))

    def predict(self, images: list[Any]) -> list[dict[str, Any]]:
        return self.classifier.classify(images)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(max_batch_size=MAX_BATCH, batch_timeout=WINDOW_S),
        accelerator="cpu",
        workers_per_device=os.cpu_count() or 1,  # what its documentation says for a CPU
        timeout=120,
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False)
