# SPDX-License-Identifier: Apache-2.0
"""Inputs made up by the thousand: requests after the OpenAPI document, and damaged images for the decoder.

    python -m tests.faults.fuzz [--images 20000] [--requests 100]

Ends with an error at the first input that is answered as nobody documented, and where a promise was broken. Writes
tests/faults/results/fuzz.json and the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
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
CHUNK = 1000  # images in one run of hypothesis
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


def damaged(examples: int, first_seed: int = 0) -> list[bytes]:
    """So many damaged images; what hypothesis draws twice is there once."""
    drawn: list[bytes] = []

    @seed(first_seed)
    @settings(_QUIETLY, max_examples=examples)
    @given(damaged_images())
    def keep(data: bytes) -> None:
        drawn.append(data)

    keep()
    return drawn


def fuzz_images(images: Iterable[bytes]) -> Counter[str]:
    """Decode damaged images: how many ended how. Raises what is neither an image nor an ImageError."""
    ends: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, of damaged EXIF
        for data in images:
            try:
                pixels = decode(data, NETWORK_INPUT, LIMITS)
            except ImageError as error:
                ends[error.code] += 1
                continue
            except Exception as error:
                error.add_note(f"of the image {data!r}")
                raise
            assert pixels.shape == (32, 32, 3)
            ends["decoded"] += 1
    return ends


def fuzz_requests(url: str, examples: int, headers: dict[str, str], first_seed: int = 0) -> Counter[str]:
    """Requests after the OpenAPI document, valid and not, to every operation: how many got which status.

    Models are loaded and unloaded under made-up names alone, or nothing else would be there to ask.

    Raises what schemathesis found: a server error or anything else that the document does not say.
    """
    statuses: Counter[str] = Counter()
    cards = httpx.get(f"{url}/v1/models", headers=headers).json()["models"]
    there = {"name": cards[0]["name"], "version": cards[0]["version"]}
    document: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in document.get_all_operations():
        assert isinstance(result, Ok), result
        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
                statuses += _fuzz_operation(result.ok(), mode, examples, headers, there, first_seed)
    return statuses


def _fuzz_operation(
    operation: Any,
    mode: schemathesis.GenerationMode,
    examples: int,
    headers: dict[str, str],
    there: dict[str, str],
    first_seed: int,
) -> Counter[str]:
    statuses: Counter[str] = Counter()
    known = mode is schemathesis.GenerationMode.POSITIVE and "/repository/" not in operation.path

    @seed(first_seed)
    @settings(_QUIETLY, max_examples=examples)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if known:  # else every answer would be that there is no such model
            case.path_parameters.update({name: there[name] for name in case.path_parameters if name in there})
        response = case.call(headers=headers)
        statuses[str(response.status_code)] += 1
        case.validate_response(response, checks=CHECKS)

    check()
    return statuses


def measured(pid: int, rounds: Sequence[Callable[[], Counter[str]]]) -> report.Result:
    """How the inputs of two rounds ended, and by how much each let the process grow: what the first takes and the
    second does not is room that is used again."""
    ends: Counter[str] = Counter()
    resident = [resident_bytes(pid)]
    for each in rounds:
        ends += each()
        resident.append(resident_bytes(pid))
    growth, again = (round((after - before) / 1e6, 1) for before, after in pairwise(resident))
    return {"tried": ends.total(), "ends": dict(ends.most_common()), "growth_mb": growth, "growth_again_mb": again}


def images_stage(images: int) -> report.Result:
    """Drawn before anything is measured: hypothesis remembers more than the decoder ever would."""
    drawn = [data for chunk in range(images // CHUNK) for data in damaged(CHUNK, chunk)]
    fuzz_images(drawn[:CHUNK])  # what is loaded once is no growth
    half = len(drawn) // 2
    return measured(os.getpid(), [partial(fuzz_images, drawn[:half]), partial(fuzz_images, drawn[half:])])


def requests_stage(examples: int) -> report.Result:
    with (
        tempfile.TemporaryDirectory() as state,
        # A compiled forward would take its room in the middle.
        running(EMBEDDED.parents[1], state_dir=state, admin_token_sha256=ADMIN_SHA256, compile="off") as server,
    ):
        ask = partial(fuzz_requests, server.url, headers={"authorization": f"Bearer {ADMIN}"})
        ask(5)
        rounds = [partial(ask, examples, first_seed=first_seed) for first_seed in (1, 2)]
        return measured(server.process.pid, rounds) | {"exit_code": server.terminate()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=100, help="for each operation, valid and not, twice")
    arguments = parser.parse_args()
    result = {"images": images_stage(arguments.images), "requests": requests_stage(arguments.requests)}
    result["promises"] = {promise: kept(result) for promise, kept in report.FUZZ_PROMISES}
    report.write("fuzz", result)
    report.require(result)


if __name__ == "__main__":
    main()
