# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.dependencies import verdict

CLEAN = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (1)"}
FLAWED = {"name": "c", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}


def test_a_vulnerability_ends_the_check_and_is_named() -> None:
    with pytest.raises(SystemExit, match="c 1: PYSEC-1; mended in 2"):
        verdict({"dependencies": [CLEAN, UNKNOWN, FLAWED]})


def test_packages_that_are_unknown_are_not_called_clean() -> None:
    assert verdict({"dependencies": [UNKNOWN, UNKNOWN]}).startswith("skipped, no advisories here")
    assert verdict({"dependencies": [CLEAN, UNKNOWN]}) == "no known vulnerability in 1 packages; 1 are unknown to it"
