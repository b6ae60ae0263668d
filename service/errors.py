# SPDX-License-Identifier: Apache-2.0
"""Errors of the service, a branch of the detector's tree.

OodgateError
└── ServiceError                  what the server answers instead of a verdict
    ├── EmptyRequest              400  no body, or no file in the form
    ├── MalformedForm             400  multipart/form-data that cannot be parsed
    ├── MalformedRequest          400  JSON that cannot be understood
    ├── PathRefused               400  a path that could leave the app behind the gate
    ├── Unauthorized              401  no token, or an unknown one
    ├── AdminOnly                 403  the admin's token is needed
    ├── AdminDisabled             403  no admin token is configured
    ├── GateDisabled              404  no app stands behind the gate
    ├── ModelNotFound             404  no model or version of that name
    ├── BodyTooLarge              413  longer than OODGATE_MAX_BODY_BYTES
    ├── TooManyImages             413  more than OODGATE_MAX_IMAGES
    ├── TooManyValues             413  more numbers in JSON than are worth parsing
    ├── UnsupportedMediaType      415  neither an image type nor multipart/form-data
    ├── QueueFull                 429  OODGATE_QUEUE_CAPACITY images are under way
    ├── StateUnwritable           500  OODGATE_STATE_DIR cannot be written
    ├── ScoringFailed             500  the network or a score failed on this batch
    ├── UpstreamFailed            502  the app behind the gate cannot be reached, or broke off
    ├── NotScored                 503  the gate forwards nothing that it could not judge
    ├── NotReady                  503  no model is loaded, or the server is stopping
    ├── EngineLost                503  the inference thread has ended
    ├── UpstreamTimeout           504  the app behind the gate did not answer within OODGATE_GATE_TIMEOUT_S
    └── DeadlinePassed            504  not answered within OODGATE_REQUEST_TIMEOUT_S
    (DriftStateMismatch is a child of OodgateError itself: no request is answered with it)
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from detector.errors import OodgateError


class ServiceError(OodgateError):
    """What the server answers instead of a verdict."""

    code: ClassVar[str] = "service_error"
    status: ClassVar[int] = 500
    retry_after_s: int | None = None


class EmptyRequest(ServiceError):
    """The request carries no image."""

    code, status = "empty_request", 400


class MalformedForm(ServiceError):
    """The form cannot be parsed."""

    code, status = "malformed_form", 400


class Unauthorized(ServiceError):
    """No token, or an unknown one."""

    code, status = "unauthorized", 401


class AdminOnly(ServiceError):
    """The admin's token is needed."""

    code, status = "admin_only", 403


class AdminDisabled(ServiceError):
    """No admin token is configured."""

    code, status = "admin_disabled", 403

    def __init__(self) -> None:
        super().__init__("no admin token is configured, so nothing can be changed; set OODGATE_ADMIN_TOKEN_SHA256")


class MalformedRequest(ServiceError):
    """The JSON of a request cannot be understood."""

    code, status = "malformed_request", 400


class ModelNotFound(ServiceError):
    """There is no model or version of that name."""

    code, status = "model_not_found", 404


class BodyTooLarge(ServiceError):
    """The request body is longer than the limit."""

    code, status = "body_too_large", 413

    def __init__(self, limit: int, announced: int | None = None) -> None:
        seen = "the body is longer than" if announced is None else f"the body has {announced:,} bytes; more than"
        super().__init__(f"{seen} the limit of {limit:,} bytes. Send a smaller image, or fewer in one request.")


class TooManyImages(ServiceError):
    """One request carries more images than the limit."""

    code, status = "too_many_images", 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request carries more than {limit} images. Send them in several requests.")


class TooManyValues(ServiceError):
    """A request holds more JSON values than the limit."""

    code, status = "too_many_values", 413

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the JSON holds more than {limit:,} values. Send the tensor as binary data, or the encoded files as "
            "image_bytes."
        )


class UnsupportedMediaType(ServiceError):
    """The content type is neither an image nor a form."""

    code, status = "unsupported_media_type", 415


class QueueFull(ServiceError):
    """As many images as the server admits are under way."""

    code, status = "queue_full", 429

    def __init__(self, capacity: int, retry_after_s: int) -> None:
        super().__init__(f"{capacity} images are under way, which is the limit. Try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class BuffersFull(ServiceError):
    """As many bytes of request bodies as the server holds are under way."""

    code, status = "buffers_full", 429

    def __init__(self, limit: int) -> None:
        super().__init__(f"request bodies of {limit:,} bytes are being held, which is the limit. Try again in 1 s.")
        self.retry_after_s = 1


class SlowRequest(ServiceError):
    """The request body did not arrive in time."""

    code, status = "slow_request", 408

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the body did not arrive within {seconds:g} s. Send a smaller image, or use a faster link.")


class ScoringFailed(ServiceError):
    """The network or a score failed on the batch, or gave no number for the image."""

    code, status = "scoring_failed", 500


class StateUnwritable(ServiceError):
    """What must outlive a restart cannot be written."""

    code, status = "state_unwritable", 500

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path} cannot be written: {error.strerror}. Nothing was changed; see OODGATE_STATE_DIR.")


class NotReady(ServiceError):
    """No model is loaded, or the server is stopping."""

    code, status = "not_ready", 503

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.retry_after_s = 5


class EngineLost(ServiceError):
    """The inference loop was lost with an image in hand, or for good; then the process should be restarted."""

    code, status = "engine_lost", 503

    def __init__(self) -> None:
        super().__init__("the inference loop was lost. Send the image again, or try another replica.")
        self.retry_after_s = 5


class DeadlinePassed(ServiceError):
    """The request was not answered in time."""

    code, status = "deadline_passed", 504

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not answered within {seconds:g} s. Send less at once, or raise OODGATE_REQUEST_TIMEOUT_S.")


class PathRefused(ServiceError):
    """The path behind the gate could lead out of the app's base path."""

    code, status = "path_refused", 400

    def __init__(self) -> None:
        super().__init__(
            "the path behind /gate/ has a segment `.` or `..`, a backslash or a control character, perhaps encoded; "
            "send the path that the app itself serves"
        )


class GateDisabled(ServiceError):
    """No app stands behind the gate."""

    code, status = "gate_disabled", 404

    def __init__(self) -> None:
        super().__init__("no app stands behind the gate; set OODGATE_GATE_UPSTREAM to its URL")


class NotScored(ServiceError):
    """The images could not be judged, and the gate fails closed."""

    code, status = "not_scored", 503

    def __init__(self, cause: OodgateError) -> None:
        super().__init__(f"not judged, so not forwarded [{cause.code}]: {cause}")
        self.retry_after_s = (cause.retry_after_s if isinstance(cause, ServiceError) else None) or 5


class UpstreamFailed(ServiceError):
    """The app behind the gate cannot be reached, or broke off."""

    code, status = "upstream_failed", 502

    def __init__(self) -> None:
        super().__init__("the app behind the gate cannot be reached or broke off; the log has more under this id")


class UpstreamTimeout(ServiceError):
    """The app behind the gate did not answer in time."""

    code, status = "upstream_timeout", 504

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the app behind the gate did not answer within {seconds:g} s; see OODGATE_GATE_TIMEOUT_S")


class DriftStateMismatch(OodgateError):
    """A stored drift state does not belong to this model, policy, calibration or release; `reason` names which."""

    code = "drift_state_mismatch"

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"the stored drift state cannot be used: {detail}. The tests start anew.")
        self.reason = reason
