# SPDX-License-Identifier: Apache-2.0
"""One file per method or family, one registry, one contract."""

from detector.scores import boundary, gaussian, gradient_norm, grood, logit, nearest, rectified  # noqa: F401 - they register
from detector.scores.base import (
    FitOptions as FitOptions,
    Gatherer as Gatherer,
    Needs as Needs,
    Score as Score,
    State as State,
    registry as registry,
)
from detector.scores.fusion import Fusion as Fusion, score_all as score_all
from detector.scores.grood import Grood as Grood, GroodNorm as GroodNorm
