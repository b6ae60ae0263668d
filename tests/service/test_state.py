# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.errors import StateUnwritable
from service.state import write_whole


def test_writers_of_one_file_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    path = tmp_path / "drift" / "model.json"
    contents = [str(number) * 10_000 for number in range(10)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_whole(path, contents[number % 10]), range(400)))
    assert path.read_text() in contents
    assert [each.name for each in path.parent.iterdir()] == ["model.json"]


def test_a_folder_that_cannot_be_written_is_named_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    write_whole(path, "before")
    path.with_suffix(".partial").mkdir()
    with pytest.raises(StateUnwritable, match="cannot be written"):
        write_whole(path, "after")
    assert path.read_text() == "before"
