# SPDX-License-Identifier: Apache-2.0
"""Ray Serve: one replica, `@serve.batch`, images decoded by a thread pool inside the batch.

python -m benchmarks.serving.peers.ray.server
"""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.serving.peers.classifier import MAX_BATCH, PORT, WINDOW_S, Classifier


@serve.deployment(max_ongoing_requests=1024)
class Classify:
    def __init__(self) -> None:
        self.classifier = Classifier.from_environment()
        self.classifier.warm()
        self.pool = ThreadPoolExecutor(os.cpu_count())

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WINDOW_S)
    async def batch(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.answers, bodies)

    def answers(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        return self.classifier.classify(list(self.pool.map(self.classifier.decode, bodies)))

    async def __call__(self, request: Request) -> dict[str, Any]:
        if request.method == "GET":
            return {"ready": True}  # Serve's own health check is green before the deployment is there
        answer: dict[str, Any] = await self.batch(await request.body())
        return answer


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    application: Any = Classify  # the decorator made it a deployment
    serve.run(application.bind(), blocking=True)
