# SPDX-License-Identifier: Apache-2.0
"""The versions of the models on disk, and those that the admin went back to while serving, which outlive a restart."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from detector.artifact import MANIFEST, REPORT, read_manifest
from detector.errors import ArtifactError
from service.state import read_whole, remove, write_whole


class PinnedVersion(BaseModel):
    """The version to serve in place of the newest, and who chose it when (seconds since 1970)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(pattern=r"^[0-9]+$")
    changed: float
    changed_by: str


class PinnedVersions:
    """One file a model beside its policy, replaced as a whole; none where the newest version is to be served.

    Args:
        state_dir: the state folder.
    """

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / "policy"  # shared by replicas, as policies are

    def read(self, name: str) -> str | None:
        """The version to serve of a model; None where it is the newest."""
        pinned = read_whole(self._path(name), PinnedVersion, "the newest version is served")
        return None if pinned is None else pinned.version

    def pin(self, name: str, version: str, changed_by: str) -> None:
        """Remember a version; it is on disk when this returns.

        Raises:
            StateUnwritable: the state folder cannot be written.
        """
        pinned = PinnedVersion(version=version, changed=time.time(), changed_by=changed_by)
        write_whole(self._path(name), pinned.model_dump_json(indent=1))

    def release(self, name: str) -> None:
        """Serve the newest version from the next start on.

        Raises:
            StateUnwritable: the state folder cannot be written.
        """
        remove(self._path(name))

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.version"


def all_versions(models: Path) -> list[Path]:
    """Every NAME/NUMBER that holds a manifest; directories of other names are left alone."""
    return [path.parent for path in models.glob(f"*/*/{MANIFEST}") if path.parent.name.isdecimal()]


def newest_versions(models: Path) -> list[Path]:
    """The version with the largest number of each model."""
    versions = sorted(all_versions(models), key=number)
    newest = {path.parent.name: path for path in versions}
    return [newest[name] for name in sorted(newest)]


def number(directory: Path) -> int:
    """Of a version, by its directory."""
    return int(directory.name)


def as_it_is(directory: Path) -> dict[str, object]:
    """What changes when a version on disk is mended or replaced, and not when it is only evaluated again."""
    files: dict[str, object] = {}
    with suppress(ArtifactError, OSError):  # a manifest that is none is told by its time, as every other file
        files |= {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
        files |= {MANIFEST: read_manifest(directory).model_digest, REPORT: REPORT in files}
    return files
