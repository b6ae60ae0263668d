# SPDX-License-Identifier: Apache-2.0
"""The search that `knn`, `grood` and their forms share."""

from __future__ import annotations

import pytest
import torch

from detector.outputs import Outputs
from detector.scores.nearest import GROUP, close, products, smallest

SIZES = [1, 7, 500, 50 * GROUP + 3]  # bank rows, also where they do not fill the last group


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("rows", SIZES)
def test_products_are_the_matrix_product(rows: int, queries: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(n, 33, generator=generator) for n in (rows, queries))
    found = products(a, b)
    assert found.shape == (rows, queries)
    assert torch.allclose(found.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wanted", [1, 5])
@pytest.mark.parametrize("rows", [size for size in SIZES if size > 5])
def test_the_smallest_keys_are_those_of_a_full_sort(rows: int, wanted: int) -> None:
    keys = torch.randn(rows, 20, generator=torch.Generator().manual_seed(rows))
    values, found = smallest(keys, wanted)
    order = keys.sort(dim=0)
    assert torch.equal(values, order.values[:wanted])
    assert torch.equal(found, order.indices[:wanted])


@pytest.mark.parametrize("rows", SIZES)
def test_close_keys_are_all_within_the_margin_of_their_columns_smallest(rows: int) -> None:
    keys = torch.randint(0, 100, (rows, 20), generator=torch.Generator().manual_seed(rows)).float()
    found = set(zip(*(part.tolist() for part in close(keys, 2.0)), strict=True))
    expected = (keys <= keys.amin(dim=0) + 2).nonzero().tolist()
    assert found == set(map(tuple, expected))


def test_outputs_that_share_compute_a_thing_once_and_others_every_time() -> None:
    asked = []
    outputs = Outputs(torch.zeros(1, 2), torch.zeros(1, 3))
    for each in (outputs, outputs.sharing()):
        for _ in range(2):
            assert each.once("key", lambda: asked.append(1) or len(asked)) == len(asked)  # type: ignore[func-returns-value]
    assert len(asked) == 3
