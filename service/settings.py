# SPDX-License-Identifier: Apache-2.0
"""Every setting of the server: one frozen object, read from the environment once, at the edge."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import torch
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from detector.images import DEFAULT_MAX_BYTES, DEFAULT_MAX_PIXELS, Limits
from detector.machine import cores
from service.security import is_loopback
from service.tracing import can_export

CORES = cores()


def _largest_batch(settings: dict[str, Any]) -> int:
    """On the CPU larger batches are no faster an image, and what the layers put out takes more memory."""
    device = settings.get("device", "auto")
    return 32 if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()) else 16


class Settings(BaseSettings):
    """Read from `OODGATE_*` variables; an argument given in code wins. Each field says what it is for."""

    model_config = SettingsConfigDict(env_prefix="OODGATE_", frozen=True, extra="forbid")

    models: Path = Field(
        default=Path("models"), description="Folder of models: NAME/VERSION/. The newest version is served."
    )
    default_model: str = Field(
        default="", description="Model behind /v1/verdict; may be empty where there is one model."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    tokens: dict[str, str] = Field(
        default_factory=dict, description="JSON object, NAME to SHA-256 of a token; none: open to all."
    )
    tokens_file: Path | None = Field(default=None, description="File of lines NAME:SHA256, more tokens.")
    admin_token_sha256: str = Field(
        default="", description="SHA-256 of the admin's token; empty: nothing can be changed."
    )
    allow_open: bool = Field(
        default=False, description="Serve beyond this machine without tokens, where the network itself is guarded."
    )
    state_dir: Path = Field(default=Path("state"), description="Folder for what must outlive a restart.")
    audit: bool = Field(default=True, description="Write one line a decision to STATE_DIR/audit/.")
    audit_max_bytes: int = Field(
        default=64 * 2**20, ge=2**10, description="Size of an audit file before it is set aside."
    )
    audit_keep: int = Field(default=15, ge=1, description="Audit files kept beside the one being written.")
    thin_s: float = Field(
        default=0.0, ge=0, description="A model's drift tests see one image a source in so many seconds; 0: all."
    )
    source_labels: int = Field(default=20, ge=1, le=1000, description="Sources of a model with a series of their own.")
    expose: Literal["all", "decision"] = Field(
        default="all", description="decision: scores and p-values are for the admin alone."
    )
    gate_upstream: str = Field(
        default="", description="URL of the app behind /gate/, with its base path; empty: there is none."
    )
    gate_upstream_authorization: SecretStr = Field(
        default=SecretStr(""), description="Authorization header for that app; empty: none is sent."
    )
    gate_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds for that app to connect, to begin its answer, and between its parts."
    )
    gate_fail_policy: Literal["closed", "open"] = Field(
        default="closed", description="open: what could not be judged is forwarded, marked as unscored."
    )
    gate_defer_status: int = Field(
        default=422, ge=200, le=599, description="Status of the gate's answer to what it defers."
    )
    gate_defer_body: dict[str, Any] | None = Field(
        default=None, description="JSON object that answers what is deferred; none: the verdict."
    )
    poll_seconds: float = Field(
        default=0.0, ge=0, description="Seconds between looks for newer versions of the models; 0 never looks."
    )
    otlp_endpoint: str = Field(
        default="", description="URL that takes OpenTelemetry traces over HTTP; empty: none are sent."
    )
    grafana_url: str = Field(default="", description="Address of a Grafana that the console links to.")
    device: str = Field(default="auto", description="cpu, cuda, cuda:N or auto.")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="A calibrated precision, or auto.")
    compile: Literal["auto", "off"] = Field(
        default="auto", description="auto: make a compiled forward beside the server where there is a C++ compiler."
    )
    cuda_graphs: bool = Field(
        default=False, description="On a CUDA device: record the forward as CUDA graphs beside the server."
    )
    jpeg: Literal["pillow", "nvjpeg"] = Field(
        default="pillow", description="nvjpeg: JPEGs are decoded on the CUDA device; what it refuses, by Pillow."
    )
    shadow_scores: tuple[str, ...] | None = Field(
        default=None, description="JSON list of scores beside the deciding one."
    )
    max_body_bytes: int = Field(default=DEFAULT_MAX_BYTES, ge=1, description="Longest request body, in bytes.")
    max_buffered_bytes: int = Field(default=256 * 2**20, ge=1, description="Request bodies held at once, in bytes.")
    max_pixels: int = Field(
        default=DEFAULT_MAX_PIXELS, ge=1, description="Most pixels of one image, read from its header."
    )
    max_images: int = Field(default=64, ge=1, description="Most images in one request.")
    max_batch: int = Field(
        default_factory=_largest_batch,
        ge=1,
        description="Most images in one forward pass; by itself 16 on the CPU, 32 on a CUDA device.",
    )
    batch_window_s: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Seconds an idle device waits, from the first image on, for a fuller batch.",
    )
    shadow_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of the batches in which shadows are scored."
    )
    queue_capacity: int = Field(default=512, ge=1, description="Images admitted at once, from decode to answer.")
    request_timeout_s: float = Field(default=30.0, gt=0, description="Seconds after which a request is given up.")
    shutdown_grace_s: float = Field(
        default=30.0, gt=0, description="Seconds to answer what was admitted before a stop."
    )
    drain_seconds: float = Field(
        default=0.0, ge=0, description="Seconds after SIGTERM in which work is still taken, not ready any more."
    )
    engine_stall_s: float = Field(default=60.0, ge=5, description="Seconds in one batch after which liveness fails.")
    decode_threads: int = Field(
        default=CORES if CORES <= 2 else CORES // 2, ge=1, description="Threads that decode images."
    )
    torch_threads: int = Field(
        default=CORES if CORES <= 2 else CORES - CORES // 2, ge=1, description="Threads of one forward pass on the CPU."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Level of the JSON log."
    )

    @field_validator("gate_upstream")
    @classmethod
    def _the_upstream_is_a_base_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = (
                parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
            )
        except ValueError:
            usable = False
        if url and (not usable or parts.query or parts.fragment):
            raise ValueError(
                f"{url!r} must be http:// or https://, a host and perhaps a path, without user, query or fragment; "
                "credentials go into OODGATE_GATE_UPSTREAM_AUTHORIZATION"
            )
        return url

    @field_validator("otlp_endpoint")
    @classmethod
    def _spans_can_be_sent(cls, url: str) -> str:
        if url and not re.match(r"https?://[^/]", url):
            raise ValueError(f"{url!r} must be a URL such as http://collector:4318/v1/traces")
        if url and not can_export():
            raise ValueError("sending traces needs packages that are not installed: pip install 'oodgate[otel]'")
        return url

    @field_validator("gate_defer_status")
    @classmethod
    def _a_deferral_has_a_body(cls, status: int) -> int:
        if status in (204, 205, 304):
            raise ValueError(f"a {status} has no body, and the gate answers with one; 422, 409 or 200 will do")
        return status

    @model_validator(mode="after")
    def _a_full_request_fits_the_queue(self) -> Self:
        if self.queue_capacity < self.max_images:
            raise ValueError(
                f"OODGATE_QUEUE_CAPACITY is {self.queue_capacity}: a request of OODGATE_MAX_IMAGES = {self.max_images} "
                "images could never be admitted. Raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _open_only_to_this_machine(self) -> Self:
        if not (self.tokens or self.tokens_file or self.allow_open or is_loopback(self.host)):
            raise ValueError(
                f"OODGATE_HOST {self.host} is reached from other machines, and no tokens are set: set OODGATE_TOKENS "
                "or OODGATE_TOKENS_FILE, or OODGATE_ALLOW_OPEN=true where the network itself is guarded"
            )
        return self

    @property
    def limits(self) -> Limits:
        """What one image may cost."""
        return Limits(max_bytes=self.max_body_bytes, max_pixels=self.max_pixels)


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """The names in an environment that look like settings and are none, each with the setting it may mean."""
    prefix = str(Settings.model_config["env_prefix"])
    known = [name.upper() for name in Settings.model_fields]
    named = {name: name.upper().removeprefix(prefix) for name in environment if name.upper().startswith(prefix)}
    return [_with_suggestion(name, known) for name in sorted(named) if named[name] not in known]


def _with_suggestion(name: str, known: list[str]) -> str:
    prefix = str(Settings.model_config["env_prefix"])
    close = get_close_matches(name.upper().removeprefix(prefix), known, n=1)
    return f"{name} (did you mean {prefix}{close[0]}?)" if close else name
