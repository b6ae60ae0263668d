# SPDX-License-Identifier: Apache-2.0
"""A short, seeded run of what `make fuzz` does at length."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.server import running
from tests.faults import fuzz


def test_damaged_images_are_decoded_or_refused_by_name() -> None:
    ends = fuzz.fuzz_images(fuzz.damaged(500))
    assert ends.total() >= 400  # what hypothesis drew twice it tries once
    assert {"decoded", "undecodable_image"} <= ends.keys()


# urllib3's, of header values that no client sends
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_requests_after_the_document_are_answered_as_it_says(toy_models: Path, tmp_path: Path) -> None:
    with running(toy_models, state_dir=str(tmp_path), admin_token_sha256=fuzz.ADMIN_SHA256) as server:
        statuses = fuzz.fuzz_requests(server.url, 5, {"authorization": f"Bearer {fuzz.ADMIN}"})
        assert {"200", "400", "404"} <= statuses.keys()
        assert server.client.get("/v2/health/live").status_code == 200
        assert not any(record["level"] == "ERROR" for record in server.log)
