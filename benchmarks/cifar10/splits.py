# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 training images in three disjoint parts: as a rule fit 40,000, tune 5,000, calibration 5,000.

Images are ordered by their digest, so the parts do not depend on the order of the files and two copies of one image
always fall on the same side. The order has nothing to do with the content: the parts are a random split.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.datasets import Images, Labels, load
from detector.images import image_ids

HELD_OUT = 5_000


def split(held_out: int = HELD_OUT) -> dict[str, tuple[Images, Labels]]:
    """The parts by name, each with its images uint8 [N, 32, 32, 3] and labels int64 [N].

    Args:
        held_out: images of tune and of calibration, each.
    """
    images, labels = load("cifar10-train")
    ids = image_ids(images)
    order = np.argsort(ids, kind="stable")
    bounds = {"calibration": (0, held_out), "tune": (held_out, 2 * held_out), "fit": (2 * held_out, len(order))}
    parts = {name: order[start:stop] for name, (start, stop) in bounds.items()}
    _refuse_shared_images(ids, parts)
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def _refuse_shared_images(ids: NDArray[np.int64], parts: dict[str, NDArray[np.int64]]) -> None:
    kept = [set(ids[part].tolist()) for part in parts.values()]
    if sum(map(len, kept)) != len(set.union(*kept)):
        raise ValueError("one image lies in two parts of the split")
