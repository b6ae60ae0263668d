# SPDX-License-Identifier: Apache-2.0
"""The loaded models, by name and version."""

from __future__ import annotations

import logging
from pathlib import Path

from detector.artifact import MANIFEST
from detector.detector import Detector
from detector.errors import ArtifactCorrupt, ArtifactNotFound, OodgateError, ScoreError
from service.engine import ServedModel, buckets, warm_up
from service.errors import ModelNotFound
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)


class Registry:
    """Models by name; the newest version of each is served.

    Args:
        settings: where the models lie, and how to run them.
        metrics: told of every load.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._models: dict[str, ServedModel] = {}

    def load_all(self) -> None:
        """Load and warm the newest version of every model.

        Raises:
            ArtifactNotFound: there is no model at all, or none of the default's name.
            OodgateError: a model cannot be loaded; the message names it.
        """
        found = newest_versions(self._settings.models)
        if not found:
            raise ArtifactNotFound(
                f"{self._settings.models} holds no model (NAME/NUMBER/manifest.json); give the folder with --models"
            )
        for directory in found:
            self._models[directory.parent.name] = self._load(directory)
        if self._settings.default_model and self._settings.default_model not in self._models:
            raise ArtifactNotFound(f"OODGATE_DEFAULT_MODEL {self._settings.default_model!r} is not in {self.names}")

    @property
    def names(self) -> list[str]:
        """Names of the loaded models, sorted."""
        return sorted(self._models)

    @property
    def ready(self) -> bool:
        """Whether there is a model to answer with."""
        return bool(self._models)

    def get(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """A model; the default one where no name is given. Raises ModelNotFound."""
        if name is None:
            name = self._settings.default_model or (self.names[0] if len(self._models) == 1 else "")
            if not name:
                raise ModelNotFound(f"there are several models; name one of {', '.join(self.names)} in the path")
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(f"there is no model {name!r}; there are {', '.join(self.names)}")
        served = model.detector.manifest.version
        if version is not None and version != served:
            raise ModelNotFound(f"version {version!r} of {name!r} is not loaded; version {served} is")
        return model

    def _load(self, directory: Path) -> ServedModel:
        settings = self._settings
        try:
            detector = Detector.load(directory, device=settings.device, precision=settings.precision)
            manifest = detector.manifest
            if (manifest.name, manifest.version) != (directory.parent.name, directory.name):
                raise ArtifactCorrupt(
                    f"{directory} holds {manifest.name} version {manifest.version}; a model keeps its name and number"
                )
            decider = detector.with_policy(detector.manifest.policy, settings.shadow_scores)
            backward = [name for name in decider.shadows if detector.fitted[name].backward]
            if backward:
                raise ScoreError(
                    f"{', '.join(backward)} runs a backward pass and cannot be a shadow; `oodgate score` computes it"
                )
            model = ServedModel(detector, decider, settings.shadow_ratio)
            warm_up(model, buckets(settings.max_batch))
        except OodgateError:
            self._metrics.model_loads.labels("failure").inc()
            raise
        self._metrics.model_loads.labels("success").inc()
        backbone = detector.backbone
        self._metrics.announce(detector.manifest, decider, str(backbone.device), backbone.precision)
        log.info("model loaded", extra={"model": detector.manifest.name, "version": detector.manifest.version})
        return model


def newest_versions(models: Path) -> list[Path]:
    """The version with the largest number of each model; directories of other names are left alone."""
    versions = [path.parent for path in models.glob(f"*/*/{MANIFEST}") if path.parent.name.isdigit()]
    newest = {path.parent.name: path for path in sorted(versions, key=lambda path: int(path.name))}
    return [newest[name] for name in sorted(newest)]
