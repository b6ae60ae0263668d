# SPDX-License-Identifier: Apache-2.0
"""Inputs made up by the thousand: requests after the OpenAPI document, and damaged images for the decoder.

    python -m tests.faults.fuzz [--images 20000] [--requests 100]

Ends with an error at the first input that is answered as nobody documented. Writes tests/faults/results/fuzz.json and
the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import warnings
from collections import Counter
from contextlib import suppress
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from detector.errors import ImageError
from detector.images import Limits, Preprocessing, decode
from tests.e2e.server import running
from tests.faults import report
from tests.faults.wire import resident_bytes
from tests.helpers import EMBEDDED, encoded, photo

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ADMIN = "boss"
ADMIN_SHA256 = hashlib.sha256(ADMIN.encode()).hexdigest()
_QUIETLY = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
NETWORK_INPUT = Preprocessing(resize=32, crop=(32, 32))
LIMITS = Limits(max_pixels=1_000_000)
SEEDS = tuple(
    encoded(photo(48, 40), image_format, **options)
    for image_format, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True, "subsampling": 0}), ("JPEG", {"restart_marker_blocks": 2}),
        ("PNG", {}), ("PNG", {"compress_level": 0}), ("WEBP", {}), ("WEBP", {"lossless": True}),
    )
)  # fmt: skip
# Where formats keep their lengths, counts and markers, a byte of these says more than any other.
TELLING = (0, 1, 2, 0x7F, 0x80, 0xC0, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE, 0xFF)

places = st.floats(0, 1, exclude_max=True)
edits: st.SearchStrategy[tuple[str, float, Any]] = st.one_of(
    st.tuples(st.just("set"), places, st.one_of(st.sampled_from(TELLING), st.integers(0, 255))),
    st.tuples(st.sampled_from(("cut", "repeat", "drop")), places, st.integers(1, 64)),
    st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("word"), places, st.sampled_from((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 65_536))),
    st.tuples(st.just("splice"), places, st.sampled_from(SEEDS)),
)


@st.composite
def damaged_images(draw: st.DrawFn) -> bytes:
    """A JPEG, PNG or WebP with bytes changed, moved, repeated, left out, or another file's in their place."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for kind, place, value in draw(st.lists(edits, min_size=1, max_size=12)):
        at = int(place * len(data))
        match kind:
            case "set":
                data[at : at + 1] = bytes([value])
            case "cut":
                del data[max(1, at) :]
            case "repeat":
                data[at:at] = data[at : at + value]
            case "drop":
                del data[at : at + value]
            case "insert":
                data[at:at] = value
            case "word":
                data[at : at + 4] = value.to_bytes(4, "big")
            case "splice":
                data[at:] = value[int(place * len(value)) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def fuzz_images(examples: int) -> Counter[str]:
    """Decode damaged images: how many ended how. Raises what is neither an image nor an ImageError."""
    ends: Counter[str] = Counter()

    @seed(0)
    @settings(_QUIETLY, max_examples=examples)
    @given(damaged_images())
    def check(data: bytes) -> None:
        try:
            pixels = decode(data, NETWORK_INPUT, LIMITS)
        except ImageError as error:
            ends[error.code] += 1
            return
        assert pixels.shape == (32, 32, 3)
        ends["decoded"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, of damaged EXIF
        check()
    return ends


def fuzz_requests(url: str, examples: int, headers: dict[str, str]) -> Counter[str]:
    """Requests after the OpenAPI document, valid and not, to every operation: how many got which status.

    Models are loaded and unloaded under made-up names alone, or nothing else would be there to ask.

    Raises what schemathesis found: a server error or anything else that the document does not say.
    """
    statuses: Counter[str] = Counter()
    cards = httpx.get(f"{url}/v1/models", headers=headers).json()["models"]
    there = {"name": cards[0]["name"], "version": cards[0]["version"]}
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in document.get_all_operations():
        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
                statuses += _fuzz_operation(result.ok(), mode, examples, headers, there)
    return statuses


def _fuzz_operation(
    operation: Any, mode: schemathesis.GenerationMode, examples: int, headers: dict[str, str], there: dict[str, str]
) -> Counter[str]:
    statuses: Counter[str] = Counter()
    known = mode is schemathesis.GenerationMode.POSITIVE and "/repository/" not in operation.path

    @seed(0)
    @settings(_QUIETLY, max_examples=examples)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if known:  # else every answer would be that there is no such model
            case.path_parameters.update({name: there[name] for name in case.path_parameters})
        response = case.call(headers=headers)
        statuses[str(response.status_code)] += 1
        case.validate_response(response, checks=CHECKS)

    check()
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=100, help="for each operation, valid and not")
    arguments = parser.parse_args()
    own = os.getpid()
    fuzz_images(1000)  # what is loaded once is no growth
    before = resident_bytes(own)
    ends = fuzz_images(arguments.images)
    growth = resident_bytes(own) - before
    with (
        tempfile.TemporaryDirectory() as state,
        running(EMBEDDED.parents[1], state_dir=state, admin_token_sha256=ADMIN_SHA256) as server,
    ):
        headers = {"authorization": f"Bearer {ADMIN}"}
        fuzz_requests(server.url, 5, headers)
        resident = resident_bytes(server.process.pid)
        statuses = fuzz_requests(server.url, arguments.requests, headers)
        server_growth = resident_bytes(server.process.pid) - resident
        code = server.terminate()
    result = {
        "images": {"tried": ends.total(), "ends": dict(ends.most_common()), "growth_mb": round(growth / 1e6, 1)},
        "requests": {
            "tried": statuses.total(), "statuses": dict(sorted(statuses.items())),
            "growth_mb": round(server_growth / 1e6, 1), "exit_code": code,
        },
    }  # fmt: skip
    report.write("fuzz", result)


if __name__ == "__main__":
    main()
