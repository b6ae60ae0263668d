# SPDX-License-Identifier: Apache-2.0
"""Real servers for those who mistreat them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Process, running


@pytest.fixture(scope="package")
def server(toy_models: Path) -> Iterator[Process]:
    """One server process for tests that leave it as they found it."""
    with running(toy_models) as process:
        yield process
