# SPDX-License-Identifier: Apache-2.0
"""Versions that the admin went back to while serving; they outlive a restart."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

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
