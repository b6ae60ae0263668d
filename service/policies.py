# SPDX-License-Identifier: Apache-2.0
"""Policies that were set while serving; they outlive a restart."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from detector.policy import Policy
from service.state import read_whole, write_whole

log = logging.getLogger(__name__)


class StoredPolicy(BaseModel):
    """A policy, the model it was set for, and who set it when (seconds since 1970)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy
    model_digest: str
    changed: float
    changed_by: str


def completed(asked: Policy, in_force: Policy) -> Policy:
    """A whole policy: what was set of the one asked for; what was left out, of its guarantee too, stays as in force."""
    changes = asked.model_dump(exclude_unset=True)
    guarantee = in_force.guarantee.model_copy(update=changes.get("guarantee", {}))
    return in_force.model_copy(update=changes | {"guarantee": guarantee})


class Policies:
    """One file a model under the state folder, replaced as a whole.

    Args:
        state_dir: the state folder.
    """

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / "policy"

    def read(self, name: str, model_digest: str) -> Policy | None:
        """The policy set for exactly this model; a new version starts from its own."""
        stored = read_whole(self._directory / f"{name}.json", StoredPolicy, "the model's own policy is used")
        if stored is None:
            return None
        if stored.model_digest != model_digest:
            log.warning("the stored policy was set for another version; the model's own is used", extra={"model": name})
            return None
        return stored.policy

    def write(self, name: str, model_digest: str, policy: Policy, changed_by: str) -> None:
        """Remember a policy; it is on disk when this returns.

        Raises:
            StateUnwritable: the state folder cannot be written.
        """
        stored = StoredPolicy(policy=policy, model_digest=model_digest, changed=time.time(), changed_by=changed_by)
        write_whole(self._directory / f"{name}.json", stored.model_dump_json(indent=1))
