# SPDX-License-Identifier: Apache-2.0
"""Write deploy/grafana/dashboards/*.json."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.source import decisions, drift, operations

DASHBOARDS = Path(__file__).parents[1] / "dashboards"


def written() -> dict[str, str]:
    """What each file should hold."""
    encode = JSONEncoder(sort_keys=True, indent=1).encode
    texts = {}
    for part in (operations, decisions, drift):
        board = part.build().build()
        for number, panel in enumerate(board.panels or [], 1):
            panel.id_val = number
        texts[f"{part.__name__.rpartition('.')[2]}.json"] = encode(board) + "\n"
    return texts


def main() -> None:
    for name, text in written().items():
        (DASHBOARDS / name).write_text(text)


if __name__ == "__main__":
    main()
