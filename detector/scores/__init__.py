# SPDX-License-Identifier: Apache-2.0
"""One file per method, one registry, one contract."""

from detector.scores.base import (
    FitOptions as FitOptions,
    Needs as Needs,
    Score as Score,
    State as State,
    registry as registry,
)
from detector.scores.grood import Grood as Grood, GroodNorm as GroodNorm
