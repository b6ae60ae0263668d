# SPDX-License-Identifier: Apache-2.0
"""All drift tests of one stream: fed batch by batch, read at any time, kept over a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from detector.calibration import Scores
from service.drift.betting import CapitalState, EvidenceStatus
from service.drift.cusum import Cusum, CusumState, CusumStatus
from service.drift.deferrals import DeferralRate
from service.drift.exchangeability import Exchangeability, ExchangeabilityState, Uniforms
from service.drift.reference import Reference
from service.drift.windows import Window, WindowState, WindowStatus
from service.errors import DriftStateMismatch

STATE_VERSION = 1
TestName = Literal["windows", "cusum", "exchangeability", "deferral_rate"]
TESTS: tuple[TestName, ...] = ("windows", "cusum", "exchangeability", "deferral_rate")


@dataclass(frozen=True)
class DriftOptions:
    """How often the tests may cry wolf.

    Args:
        windows: sizes of the windows of the deferral ratio.
        window_alarms_per_million: windows outside their limits expected in a million in-distribution images, all sizes
            and both limits together.
        run_length: images to a false alarm of the CUSUM, on average.
        run_length_delta: share of calibrations for which it may be shorter.
        shift_ratio: p1 / p0 of the CUSUM, near the ratio it finds soonest.
        exchangeability_probability: P(a false alarm, ever) of the exchangeability test.
        deferral_probability, deferral_delta: P(a false alarm, ever) of the deferral-rate test is at most their sum.
        confidence: of the lower bound on the OOD share, for each window.
        edges: calibration scores that the exchangeability test keeps; its memory.
    """

    windows: tuple[int, ...] = (1_000, 10_000)
    window_alarms_per_million: float = 1.0
    run_length: float = 1e6
    run_length_delta: float = 0.025
    shift_ratio: float = 1.5
    exchangeability_probability: float = 0.01
    deferral_probability: float = 0.005
    deferral_delta: float = 0.005
    confidence: float = 0.95
    edges: int = 1_000


@dataclass(frozen=True)
class DriftStatus:
    """All statistics now.

    Args:
        images, deferred: since the last reset of everything.
        windows: one for each size.
        cusum, exchangeability, deferral_rate: the other tests.
    """

    images: int
    deferred: int
    windows: tuple[WindowStatus, ...]
    cusum: CusumStatus
    exchangeability: EvidenceStatus
    deferral_rate: EvidenceStatus

    @property
    def alarms(self) -> dict[str, bool]:
        """Which tests stand in alarm; the windows by size, `window_1000`."""
        by_size = {f"window_{window.size}": window.alarm for window in self.windows}
        others = {name: getattr(self, name).alarm for name in TESTS if name != "windows"}
        return by_size | others


class _State(BaseModel, extra="forbid", strict=True):
    images: int = Field(ge=0)
    deferred: int = Field(ge=0)
    seed: int = Field(ge=0)
    drawn: int = Field(ge=0)
    windows: list[WindowState]
    cusum: CusumState
    exchangeability: ExchangeabilityState
    deferral_rate: CapitalState


@dataclass
class Drift:
    """Watches the deciding score of one model under one policy. Calls must not overlap.

    Assumes that images are drawn independently (see `sources.Thin` for bursts and video).

    Args:
        reference: the calibration and its cut.
        options: promises of the tests.
        seed: of the random numbers that smooth ranks; any number will do.
    """

    reference: Reference
    options: DriftOptions = field(default_factory=DriftOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        options, reference = self.options, self.reference
        self._images = self._deferred = 0
        self._uniforms = Uniforms(self.seed)
        share = options.window_alarms_per_million / len(options.windows)
        self._windows = [Window(reference, size, share, options.confidence) for size in options.windows]
        self._cusum = Cusum(reference, options.run_length_delta, options.shift_ratio, options.run_length)
        self._exchangeability = Exchangeability(
            reference, options.edges, options.exchangeability_probability, self._uniforms
        )
        self._deferral_rate = DeferralRate(reference, options.deferral_probability, options.deferral_delta)

    def update(self, scores: Scores, deferred: NDArray[np.bool_]) -> None:
        """Take in a batch, in the order served; split into other batches it would give the same, bit for bit.

        Args:
            scores: float64 [m], larger = more OOD; one that is no number counts as the largest.
            deferred: bool [m]: the score exceeds the threshold. Images deferred for low confidence alone are False.

        Raises:
            ValueError: the two are not of one length.
        """
        if scores.ndim != 1 or scores.shape != deferred.shape:
            raise ValueError(f"scores {scores.shape} and deferred {deferred.shape} must be vectors of one length")
        self._images += len(scores)
        self._deferred += int(np.count_nonzero(deferred))
        for window in self._windows:
            window.update(deferred)
        self._cusum.update(deferred)
        self._exchangeability.update(scores)
        self._deferral_rate.update(deferred)

    def snapshot(self) -> DriftStatus:
        """Statistics, limits and alarms now."""
        return DriftStatus(
            self._images,
            self._deferred,
            tuple(window.status() for window in self._windows),
            self._cusum.status(),
            self._exchangeability.status(),
            self._deferral_rate.status(),
        )

    def reset(self, test: TestName | Literal["all"] = "all") -> None:
        """Start a test, or all of them, anew; its alarm is gone. Raises ValueError for another name."""
        parts: dict[str, list[Window | Cusum | Exchangeability | DeferralRate]] = {
            "windows": [*self._windows],
            "cusum": [self._cusum],
            "exchangeability": [self._exchangeability],
            "deferral_rate": [self._deferral_rate],
        }
        if test not in ("all", *parts):
            raise ValueError(f"there is no drift test {test!r}; there are all, {', '.join(parts)}")
        for name, tests in parts.items():
            for each in tests if test in ("all", name) else []:
                each.reset()
        if test == "all":
            self._images = self._deferred = 0

    def state(self) -> dict[str, Any]:
        """Everything that a restart must remember, for JSON; its size does not grow with the stream."""
        state = _State(
            images=self._images,
            deferred=self._deferred,
            seed=self.seed,
            drawn=self._uniforms.images,
            windows=[window.state for window in self._windows],
            cusum=self._cusum.state,
            exchangeability=self._exchangeability.state(),
            deferral_rate=self._deferral_rate.state(),
        )
        return {"version": STATE_VERSION, "of": self._identity(), "state": state.model_dump()}

    @classmethod
    def from_state(cls, stored: Mapping[str, Any], reference: Reference, options: DriftOptions | None = None) -> Self:
        """Go on where `state` was taken, as if nothing had happened.

        Raises:
            DriftStateMismatch: the state is of another model, policy, calibration, options or release, or damaged;
                `reason` names which. Start a new Drift then.
        """
        if stored.get("version") != STATE_VERSION:
            raise DriftStateMismatch("version", f"it has version {stored.get('version')!r}, not {STATE_VERSION}")
        try:
            state = _State.model_validate(stored.get("state"))
            drift = cls(reference, options or DriftOptions(), state.seed)
            drift._require(stored["of"])
            drift._restore(state)
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            raise DriftStateMismatch("damaged", f"it is damaged: {error}") from None
        return drift

    def _identity(self) -> dict[str, Any]:
        options = asdict(self.options)
        return self.reference.identity() | {"options": options | {"windows": list(self.options.windows)}}

    def _require(self, of: Mapping[str, Any]) -> None:
        for name, value in self._identity().items():
            if of[name] != value:
                raise DriftStateMismatch(name, f"it is of another {name}: {of[name]!r}, now {value!r}")

    def _restore(self, state: _State) -> None:
        self._images, self._deferred = state.images, state.deferred
        self._uniforms.seek(state.drawn)
        for window, kept in zip(self._windows, state.windows, strict=True):
            window.restore(kept)
        self._cusum.restore(state.cusum)
        self._exchangeability.restore(state.exchangeability)
        self._deferral_rate.restore(state.deferral_rate)
