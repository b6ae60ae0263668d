# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes come, the parser answers with images or with one of our errors."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from service.errors import ServiceError
from service.tensors import Asked, parse

FILE = bytes(range(40))
BINARY = {"name": "image_bytes", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 88}}
PIXELS = {"name": "image", "shape": [2, 2, 2, 3], "datatype": "UINT8", "data": list(range(24))}
IN_JSON = {"name": "image_bytes", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(FILE).decode()]}

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
names = st.sampled_from(["name", "shape", "datatype", "parameters", "data"])


def parsed(body: bytes, header: str | None) -> Asked | None:
    with suppress(ServiceError):
        asked = parse(body, header, max_images=64)
        assert 1 <= len(asked.images) <= 64
        return asked
    return None


def request(tensor: dict[str, Any], behind: bytes = b"") -> tuple[bytes, str]:
    document = json.dumps({"id": "1", "inputs": [tensor], "outputs": [{"name": "label"}]}).encode()
    return document + behind, str(len(document))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from([BINARY, PIXELS, IN_JSON]), st.dictionaries(names, values, max_size=2))
def test_any_json_in_any_member_is_read_or_refused(tensor: dict[str, Any], changed: dict[str, Any]) -> None:
    parsed(*request(tensor | changed, struct.pack("<I", 40) + FILE))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values)
def test_any_json_at_all_is_read_or_refused(document: Any) -> None:
    parsed(json.dumps(document).encode(), None)


@pytest.mark.parametrize("tensor", [BINARY, PIXELS, IN_JSON], ids=["binary", "pixels", "base64"])
def test_damaged_bytes_are_read_or_refused(tensor: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    body, header = request(tensor, 2 * (struct.pack("<I", 40) + FILE) if tensor is BINARY else b"")
    assert parsed(body, header) is not None
    ways: list[Callable[[int], bytes]] = [
        lambda at: body[:at],
        lambda at: body[:at] + bytes([generator.integers(256)]) + body[at + 1 :],
        lambda at: body[:at] + generator.bytes(3) + body[at:],
        lambda at: body[:at] + body[at + 5 :],
    ]
    for case in range(3000):
        damaged = ways[case % 4](int(generator.integers(len(body))))
        parsed(damaged, header if case % 3 else None)
