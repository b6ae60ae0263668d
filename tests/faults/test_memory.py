# SPDX-License-Identifier: Apache-2.0
"""What stays in memory when a request is over, and when time passes: nothing, in counts of objects."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import pytest

from service import Settings
from tests.faults import soak
from tests.faults.wire import at_rest, connected
from tests.service.conftest import serving


async def every_kind(url: str, times: int) -> int:
    """Each request of the mixed traffic so many times, one after another; how many that were."""
    kinds = soak.mixture("toy")
    for data, due in kinds * times:
        async with connected(url) as connection:
            await connection.send(data)
            if due is not None:
                assert (await connection.reply()).status == due
    await at_rest(url)
    return times * len(kinds)


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_requests_of_any_kind_leave_no_object_behind(
    toy_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    with serving(Settings(models=toy_models, state_dir=tmp_path)) as running:
        # The last quarter of an hour, which is kept, grows with time rather than with requests: so time stands still.
        monkeypatch.setattr(running.context.recent, "_clock", lambda: now)
        asyncio.run(every_kind(running.url, 2))
        grown = []
        for _ in range(2):  # threads of pools, made when they are first needed, are new only once
            before = objects()
            asked = asyncio.run(every_kind(running.url, 6))
            grown.append(objects() - before)
        assert min(grown) < asked / 10


def test_time_that_passes_leaves_no_object_behind(toy_models: Path, tmp_path: Path) -> None:
    with serving(Settings(models=toy_models, state_dir=tmp_path)) as running:
        before, seconds = objects(), 1000
        for _ in range(seconds):
            running.context.watch.refresh()
        assert objects() - before < seconds / 10
