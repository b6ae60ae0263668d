# SPDX-License-Identifier: Apache-2.0
"""An approximate nearest-row index for large banks, faiss's inverted lists. Needs the extra `index`.

The lists' centres are found once, when the scores are fitted, and kept as `centres` in their state, so that calibration
and every server search the same lists: the promise is calibrated on what the search finds, not on what it should have
found. What is found is measured again in float64; a distance can only come out too long, never too short.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detector.errors import ScoreError
from detector.scores.base import FitOptions, State

INDEX_FROM = 50_000  # bank rows; below, the exact search is cheap beside a network of this width: docs/scaling.md
ROWS_PER_LIST = 100
SEARCHED = 16  # lists looked at for each image
ROUNDS, SEED = 8, 0  # of the k-means


def kept(bank: Tensor, options: FitOptions) -> State:
    """What a score keeps for an index over a bank [B, D]: nothing, where none is asked for or the bank is small."""
    return {"centres": centres(bank)} if options.index and len(bank) >= INDEX_FROM else {}


def centres(bank: Tensor) -> Tensor:
    """The centres of the lists for a bank [B, D], float32 [L, D]: k-means, on one thread, with a fixed seed.

    Raises:
        ScoreError: faiss is not installed.
    """
    faiss = require_faiss()
    lists = max(1, round(len(bank) / ROWS_PER_LIST))
    rows = bank.float().contiguous()
    clustering = faiss.Kmeans(rows.shape[1], lists, niter=ROUNDS, seed=SEED, min_points_per_centroid=1)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # another number of threads adds in another order
    try:
        clustering.train(rows.numpy())
    finally:
        faiss.omp_set_num_threads(threads)
    return torch.from_numpy(clustering.centroids.copy())


def built(bank: Tensor, centres: Tensor | None) -> NearestIndex | None:
    """The index that a fitted score asks for."""
    return None if centres is None else NearestIndex(bank, centres)


class NearestIndex:
    """Rows of a bank [B, D] in lists around `centres` float32 [L, D]; it searches on the CPU, in float32.

    Raises:
        ScoreError: faiss is not installed.
    """

    def __init__(self, bank: Tensor, centres: Tensor) -> None:
        faiss = require_faiss()
        self._quantizer = faiss.IndexFlatL2(centres.shape[1])
        self._quantizer.add(centres.cpu().float().contiguous().numpy())
        self._index: Any = faiss.IndexIVFFlat(self._quantizer, centres.shape[1], len(centres))
        self._index.add(bank.cpu().float().contiguous().numpy())
        self._index.nprobe = min(SEARCHED, len(centres))

    def nearest(self, queries: Tensor, wanted: int) -> Tensor:
        """The rows found nearest to queries [N, D], int64 [N, wanted] on their device, the nearest first.

        Where the lists searched hold too few rows, more lists are searched.
        """
        query = queries.detach().cpu().float().contiguous().numpy()
        _, found = self._index.search(query, wanted)
        short = (found < 0).any(axis=1)
        if short.any():
            everywhere = require_faiss().SearchParametersIVF(nprobe=self._index.nlist)
            _, found[short] = self._index.search(query[short], wanted, params=everywhere)
        rows: Tensor = torch.from_numpy(found).to(queries.device)
        return rows


def require_faiss() -> Any:
    """The library faiss; ScoreError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ScoreError("an index over a bank needs faiss: pip install 'oodgate[index]'") from error
    return faiss
