# SPDX-License-Identifier: Apache-2.0
"""Names of scores for tables: those of which something was changed after the freeze carry a mark in all of them."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).parent / "frozen.toml"
MARK = "(tuned on test)"


@cache
def frozen() -> dict[str, Any]:
    """The constants and what changed after they were frozen."""
    return tomllib.loads(FROZEN.read_text())


def later_scores() -> list[str]:
    """The scores of the freezes after the first."""
    return [score for freeze in ("second", "third", "fourth") for score in frozen()[freeze]["scores"]]


def label(score: str, network: str, text: str | None = None) -> str:
    """A score's name as Markdown, or another text for it, with its mark on the networks where it has one."""
    changes = frozen()["changed"]
    changed = score in (*changes["scores"], *changes["on"].get(network, []), *later_scores())
    return f"{text or f'`{score}`'} {MARK}" if changed else text or f"`{score}`"
