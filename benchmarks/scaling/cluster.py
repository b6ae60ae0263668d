# SPDX-License-Identifier: Apache-2.0
"""A Ray of one machine for the length of a block, and oodgate on it."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve

ROOT = Path(__file__).parents[2]
ACTOR = {"num_cpus": 1}


@contextmanager
def machine(**environment: str) -> Iterator[None]:
    """Ray with two places for replicas, whatever the number of cores."""
    # A busy machine takes longer than five seconds to start a process, and more where the process comes last.
    os.environ |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_worker_niceness": "0"}
    env_vars = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"} | environment
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env_vars})
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def serving(replicas: int) -> Iterator[str]:
    """The URL of oodgate with so many replicas; they are ready."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    release(replicas)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def release(replicas: int, **environment: str) -> None:
    """Serve by so many replicas with these variables, in place of those that serve now; back when all do."""
    from service.ray_serve import Oodgate

    deployment: Any = Oodgate
    actor = ACTOR | ({"runtime_env": {"env_vars": environment}} if environment else {})
    options = {"max_ongoing_requests": 64, "health_check_period_s": 1.0, "ray_actor_options": actor}
    serve.run(deployment.options(num_replicas=replicas, **options).bind(), name="oodgate")


def free_port() -> int:
    """Below the ports that connections get by chance: Ray takes its time until it listens."""
    for port in random.sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


def replicas() -> list[Any]:
    """The actors that answer requests."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA")]
    return [ray.get_actor(name, namespace="serve") for name in names]


def workers(title: str) -> list[int]:
    """Process ids of the workers of this Ray whose title holds a word."""
    below = psutil.Process().children(recursive=True)
    found = []
    for process in below:
        with suppress(psutil.NoSuchProcess):
            if any(title in word for word in process.cmdline()):
                found.append(process.pid)
    return found
