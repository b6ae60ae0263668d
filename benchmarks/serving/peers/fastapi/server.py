# SPDX-License-Identifier: Apache-2.0
"""Plain FastAPI: a synchronous handler, which Starlette runs in its thread pool.

uvicorn benchmarks.serving.peers.fastapi.server:app
"""

from typing import Annotated, Any

from fastapi import Body, FastAPI

from benchmarks.serving.peers.classifier import Classifier

app = FastAPI()
classifier = Classifier.from_environment()
classifier.warm()


@app.post("/predict")
def predict(image: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
    return classifier.classify([classifier.decode(image)])[0]


@app.get("/health")
def health() -> str:
    return "ok"
