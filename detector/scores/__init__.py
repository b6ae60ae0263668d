# SPDX-License-Identifier: Apache-2.0
"""One file per method or family, one registry, one contract."""

from detector.scores import (  # noqa: F401 - they register
    boundary,
    exgrad_full,
    gaia,
    gaussian,
    gradient_norm,
    grood,
    image,
    logit,
    lowdim,
    lowdim_full,
    nac,
    nearest,
    rectified,
)
from detector.scores.base import (
    FitOptions as FitOptions,
    Gatherer as Gatherer,
    Score as Score,
    State as State,
    registry as registry,
)
from detector.scores.fusion import (
    Fusion as Fusion,
    FusionImage as FusionImage,
    FusionLean as FusionLean,
    score_all as score_all,
)
from detector.scores.grood import Grood as Grood, GroodNorm as GroodNorm
