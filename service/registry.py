# SPDX-License-Identifier: Apache-2.0
"""The loaded models: which version of each is served, and under which policy.

A version is loaded, proven and warmed aside; only then does one assignment make it the one that new requests get.
Requests that already hold the old one finish with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TypeVar

import torch

from detector.detector import Detector
from detector.errors import ArtifactCorrupt, ArtifactNotFound, OodgateError, ScoreError
from detector.machine import own_threads, reclaim_memory, return_freed_memory
from detector.policy import Policy
from detector.settling import ForwardState, Settling
from service.errors import ModelNotFound
from service.metrics import Metrics
from service.policies import Policies, completed
from service.served import ServedModel, buckets, warm_up
from service.settings import Settings
from service.versions import PinnedVersions, all_versions, as_it_is, newest_versions, number
from service.watch import Watch

log = logging.getLogger(__name__)

RETRY_S = 60  # seconds until polling tries a version again that failed for a reason which may pass

T = TypeVar("T")


@dataclass(frozen=True)
class LoadFailure:
    """Why a version could not be loaded when it was last tried; another one serves."""

    version: str
    code: str
    detail: str


class Registry:
    """Models by name.

    Args:
        settings: where the models lie, and how to run them.
        metrics: told of every load.
        watch: told which model and policy decides from now on.
    """

    def __init__(self, settings: Settings, metrics: Metrics, watch: Watch) -> None:
        self._settings, self._metrics, self._watch = settings, metrics, watch
        self._policies = Policies(settings.state_dir)
        self._models: dict[str, ServedModel] = {}
        self._pinned = PinnedVersions(settings.state_dir)
        self._failures: dict[Path, LoadFailure] = {}  # by version
        self._tried: dict[Path, tuple[dict[str, object], float]] = {}  # by version: as it was, until when
        self._settling: dict[str, Settling] = {}
        self._one_change = asyncio.Lock()
        self._loader = ThreadPoolExecutor(1, "loader", initializer=own_threads, initargs=(settings.torch_threads,))

    def load_all(self) -> None:
        """Load and warm of every model the version that the admin went back to, else the newest that can be served.

        Raises:
            ArtifactNotFound: there is no model at all, or none of the default's name.
            OodgateError: no version of a model can be loaded; the message is that of the first that was tried.
        """
        found = [path.parent.name for path in newest_versions(self._settings.models)]
        if not found:
            raise ArtifactNotFound(
                f"{self._settings.models} holds no model (NAME/NUMBER/manifest.json); give the folder with --models"
            )
        for name in found:
            self._load_first_whole(name)
        if self._settings.default_model and self._settings.default_model not in self._models:
            raise ArtifactNotFound(f"OODGATE_DEFAULT_MODEL {self._settings.default_model!r} is not in {self.names}")

    def _load_first_whole(self, name: str) -> None:
        refused: list[OodgateError] = []
        for directory in self._wanted(name):
            try:
                self._take(self._load(directory), directory)
            except OodgateError as error:
                refused.append(error)
                continue
            if refused:
                extra = {"model": name, "version": directory.name, "code": refused[0].code}
                log.error("another version is served, the one to be served cannot be: %s", refused[0], extra=extra)
            return
        raise refused[0]

    def _wanted(self, name: str) -> list[Path]:
        """What to serve of a model at a start, best first: the version that the admin went back to, then the newest."""
        versions = sorted(self._versions(name), key=number, reverse=True)
        pinned = self._pinned.read(name)
        if pinned is None:
            return versions
        if pinned in [path.name for path in versions]:
            log.warning("the version that the admin chose is to be served", extra={"model": name, "version": pinned})
        else:
            gone = f"version {pinned}, which the admin chose, is not in the folder of models any more"
            self._failures[self._settings.models / name / pinned] = LoadFailure(pinned, ArtifactNotFound.code, gone)
            log.error("the newest version is served: %s", gone, extra={"model": name})
        return sorted(versions, key=lambda path: path.name != pinned)

    def _versions(self, name: str) -> list[Path]:
        return [path for path in all_versions(self._settings.models) if path.parent.name == name]

    @property
    def names(self) -> list[str]:
        """Names of the loaded models, sorted."""
        return sorted(self._models)

    @property
    def ready(self) -> bool:
        """Whether there is a model to answer with."""
        return bool(self._models)

    def in_place_of(self, model: ServedModel) -> ServedModel | None:
        """What is served now under a model's name; None where nothing is."""
        return self._models.get(model.detector.manifest.name)

    def get(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """A model; the default one where no name is given. Raises ModelNotFound."""
        if name is None:
            name = self._settings.default_model or (self.names[0] if len(self._models) == 1 else "")
        model = self._models.get(name)
        if not self._models:
            raise ModelNotFound("no model is loaded; the admin loads one by POST /v2/repository/models/NAME/load")
        if not name:
            raise ModelNotFound(f"there are several models; name one of {', '.join(self.names)} in the path")
        if model is None:
            raise ModelNotFound(f"there is no model {name!r}; there are {', '.join(self.names)}")
        served = model.detector.manifest.version
        if version is not None and version != served:
            raise ModelNotFound(f"version {version!r} of {name!r} is not loaded; version {served} is")
        return model

    def settle(self) -> None:
        """Begin to make the faster forward of every loaded model; called on the event loop."""
        self._loop = asyncio.get_running_loop()
        for settling in self._settling.values():
            settling.start()

    def forward(self, name: str) -> ForwardState:
        """Which forward of a model is in force, and whether it stays so. Raises ModelNotFound."""
        serving = self.get(name).detector.backbone.mode
        state = self._settling[name].state
        return replace(state, mode=serving, settled=state.settled and state.mode == serving)

    def failure(self, name: str) -> LoadFailure | None:
        """The newest version of a model that could not be loaded when it was last tried, if there is one."""
        failures = [failure for path, failure in self._failures.items() if path.parent.name == name]
        return max(failures, key=lambda failure: int(failure.version), default=None)

    def on_disk(self) -> dict[tuple[str, str], str]:
        """Name and version of everything that could be loaded, sorted, each with why it could not when last tried."""
        found = sorted(all_versions(self._settings.models))
        failures = self._failures
        return {(path.parent.name, path.name): failures[path].detail if path in failures else "" for path in found}

    def pinned(self, name: str) -> bool:
        """Whether the admin went back to the version of a model that is served, so that no newer one takes over."""
        return self._pinned.read(name) == self.get(name).detector.manifest.version

    async def load(self, name: str, version: str | None, changed_by: str) -> ServedModel:
        """Load a version, the newest where none is given, prove it aside, and serve it from now on.

        One that is not the newest stays after a restart, too, until the newest is loaded or the model unloaded.

        Raises:
            ModelNotFound: there is no such model or version on disk.
            StateUnwritable: it could not be remembered, so nothing was changed.
            OodgateError: it cannot be served; the one that served before still does.
        """
        found = self._versions(name)
        chosen = [path for path in found if version is None or path.name == version]
        if not chosen:
            there = ", ".join(f"{path.parent.name}/{path.name}" for path in found) or "none of that name"
            wanted = name if version is None else f"{name}/{version}"
            raise ModelNotFound(f"there is no {wanted} in the folder of models; there is {there}")
        directory = max(chosen, key=number)
        if directory == max(found, key=number):
            remember = partial(self._pinned.release, name)
        else:
            remember = partial(self._pinned.pin, name, directory.name, changed_by)
        async with self._one_change:
            return await self._replace(directory, remember)

    async def unload(self, name: str) -> None:
        """Serve a model no more, until it is loaded or a newer version is found.

        Raises:
            ModelNotFound: it is not loaded.
            StateUnwritable: a version that the admin went back to could not be forgotten, so nothing was changed.
        """
        async with self._one_change:
            version = self.get(name).detector.manifest.version
            tried = await self._aside(lambda: {path: (as_it_is(path), inf) for path in self._versions(name)})
            await self._aside(partial(self._pinned.release, name))
            self._tried |= tried
            self._watch.end(name)
            self._metrics.retire(name)
            self._models = {other: served for other, served in self._models.items() if other != name}
            settling = self._settling.pop(name)
        await self._aside(partial(_let_go, settling))
        log.info("model unloaded", extra={"model": name, "version": version})

    async def set_policy(self, name: str, asked: Policy, changed_by: str) -> ServedModel:
        """Decide by another policy from now on, recomputed from the stored calibration scores; it outlives a restart.

        What was not set in `asked` stays as it is in force when its turn comes.

        Raises:
            ModelNotFound: there is no such model.
            CalibrationError, TooFewSamples: the calibration cannot keep what the policy promises.
            StateUnwritable: it could not be remembered, so nothing was changed.
        """
        async with self._one_change:
            model = self.get(name)
            policy = completed(asked, model.decider.policy)
            wanted = self._under(model, policy)  # what cannot be kept is not remembered
            await self._aside(wanted.decider.expected_acceptance)  # drawn once
            digest = model.detector.manifest.model_digest
            await self._aside(partial(self._policies.write, name, digest, policy, changed_by))
            changed = self._under(self.get(name), policy)  # its compiled forward may have taken over meanwhile
            self._serve(changed)
        await self._aside(return_freed_memory)  # the limits of the drift tests took tens of megabytes
        log.info("policy changed", extra={"model": name, "policy": policy.model_dump(), "changed_by": changed_by})
        return changed

    async def load_newer(self) -> None:
        """Load each version on disk that is newer than the one served and has not been tried as it is.

        A version that the admin went back to stays. One that failed for a reason which may pass is tried again.
        """
        for directory in await self._aside(partial(newest_versions, self._settings.models)):
            try:
                async with self._one_change:  # decided before it, this could undo what the admin changes meanwhile
                    await self._load_if_newer(directory)
            except OodgateError as error:
                log.error("a new version cannot be served: %s", error, extra={"code": error.code})
            except Exception as error:
                log.error("a new version cannot be served", exc_info=error)

    async def _load_if_newer(self, directory: Path) -> None:
        if not self._newer(directory):
            return
        found = await self._aside(partial(as_it_is, directory))
        known, until = self._tried.get(directory, (None, inf))
        if known == found and time.monotonic() < until:
            return
        self._tried[directory] = found, inf
        try:
            await self._replace(directory)
        except Exception as error:
            if _may_pass(error):
                self._tried[directory] = found, time.monotonic() + RETRY_S
            raise

    def _newer(self, directory: Path) -> bool:
        """Whether a version may take over by itself from what is served."""
        name = directory.parent.name
        served = self._models.get(name)
        if served is None:
            return True
        return number(directory) > int(served.detector.manifest.version) and not self.pinned(name)

    def close(self) -> None:
        """End what loads and what compiles."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        for settling in self._settling.values():
            settling.close()

    async def _replace(self, directory: Path, remember: Callable[[], None] = lambda: None) -> ServedModel:
        """Load a version and serve it; for whoever holds the lock."""
        name = directory.parent.name
        model = await self._aside(partial(self._load, directory))
        await self._aside(remember)
        self._failures = {path: why for path, why in self._failures.items() if path.exists()}
        before = self._settling.get(name)
        self._take(model, directory)
        self._settling[name].start()
        if before is not None:
            await self._aside(partial(_let_go, before))
        return model

    async def _aside(self, work: Callable[[], T]) -> T:
        """Do what takes long off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._loader, work)

    def _load(self, directory: Path) -> ServedModel:
        settings = self._settings
        try:
            detector = Detector.load(directory, device=settings.device, precision=settings.precision)
            manifest = detector.manifest
            if (manifest.name, manifest.version) != (directory.parent.name, directory.name):
                raise ArtifactCorrupt(
                    f"{directory} holds {manifest.name} version {manifest.version}; a model keeps its name and number"
                )
            own = ServedModel(detector, detector.decider, settings.shadow_ratio)
            stored = self._policies.read(manifest.name, manifest.model_digest)
            model = self._under(own, stored or manifest.policy)
            warm_up(model, buckets(settings.max_batch))
            model.decider.expected_acceptance()  # drawn once, and not on the event loop
            return_freed_memory()
        except Exception as error:
            self._metrics.model_loads.labels("failure").inc()
            self._failures = self._failures | {directory: _failure(directory.name, error)}
            raise
        self._failures = {path: why for path, why in self._failures.items() if path != directory}
        self._metrics.model_loads.labels("success").inc()
        log.info("model loaded", extra={"model": manifest.name, "version": manifest.version})
        return model

    def _under(self, model: ServedModel, policy: Policy) -> ServedModel:
        detector = model.detector
        manifest = detector.manifest
        shadows: Sequence[str] | None = self._settings.shadow_scores
        if shadows is None:  # whoever decides by another score still sees what the model's own would have said
            shadows = tuple(dict.fromkeys((*manifest.shadow_scores, manifest.policy.score_name)))
        decider = detector.with_policy(policy, shadows)
        backward = [name for name in (policy.score_name, *decider.shadows) if detector.fitted[name].backward]
        if backward:
            raise ScoreError(
                f"{', '.join(backward)} runs a backward pass and can neither decide nor be a shadow; "
                "`oodgate score` computes it"
            )
        return replace(model, decider=decider)

    def _take(self, model: ServedModel, directory: Path) -> None:
        """Serve a model that was just loaded, eagerly, until its faster forward is proven."""
        settings = self._settings
        compiled = settings.state_dir / "compile" if settings.compile == "auto" else None
        name = model.detector.manifest.name
        self._settling[name] = Settling(
            model.detector,
            directory,
            compiled,
            partial(self._hand_over, model.detector),
            record=buckets(settings.max_batch) if settings.cuda_graphs else (),
            threads=settings.torch_threads,
        )
        self._serve(model)

    def _hand_over(self, eager: Detector, settled: Detector) -> None:
        """Told on the thread that settled: warm the faster form, then let the event loop take it."""
        warm_up(ServedModel(settled, settled.decider), buckets(self._settings.max_batch))
        self._loop.call_soon_threadsafe(self._replace_forward, eager, settled)

    def _replace_forward(self, eager: Detector, settled: Detector) -> None:
        name = eager.manifest.name
        model = self._models.get(name)
        if model is not None and model.detector is eager:  # else another version came in the meantime
            # The decider stays the same, for by it the drift tests know that they may go on.
            model.decider.tolerances = settled.manifest.score_tolerance[settled.backbone.precision]
            self._serve(replace(model, detector=settled))

    def _serve(self, model: ServedModel) -> None:
        manifest, backbone = model.detector.manifest, model.detector.backbone
        self._metrics.retire(manifest.name)
        self._metrics.announce(manifest, model.decider, str(backbone.device), backbone.precision, backbone.mode)
        self._watch.begin(model)
        self._models = self._models | {manifest.name: model}


def _let_go(settling: Settling) -> None:
    """Free a model that is served no more; what still answers with it frees it later."""
    settling.close()
    reclaim_memory()


def _may_pass(error: Exception) -> bool:
    """Whether a load failed for more than what the version's files say: a device out of memory, a disk."""
    return not isinstance(error, OodgateError) or isinstance(error.__cause__, OSError | torch.cuda.OutOfMemoryError)


def _failure(version: str, error: Exception) -> LoadFailure:
    if isinstance(error, OodgateError):
        return LoadFailure(version, error.code, str(error))
    return LoadFailure(version, "internal_error", f"unexpected {type(error).__name__}; the log has more")
