# SPDX-License-Identifier: Apache-2.0
"""Every error of the detector, one tree.

    OodgateError
    ├── ImageError (ValueError)          the bytes of one image
    │   ├── TooManyBytes                 longer than the byte limit
    │   ├── TooManyPixels                the header announces more pixels than the limit
    │   ├── UnsupportedImageFormat       an image, but neither JPEG, PNG nor WebP
    │   └── UndecodableImage             no image, or a damaged one
    ├── BackboneError                    a network that cannot be used as asked
    │   ├── UnknownBackbone              the spec names none we can build
    │   ├── UnsafeArchive                a .pt2 whose archive names a pickled payload
    │   ├── TapNotFound                  no last linear layer, or no layer of that name
    │   └── WeightsMismatch              not the weights that were calibrated
    ├── DataError (ValueError)           a data set that cannot be used as asked
    │   ├── ClassOrderMismatch           the labels do not follow the order of the network's outputs
    │   └── EmptyClass                   a class without images
    ├── ScoreError                       a score that cannot be fitted or computed
    │   └── NonFiniteFeatures            NaN or infinity came out of the network
    ├── CalibrationError
    │   ├── TooFewSamples                n is too small for the guarantee asked
    │   └── SplitOverlap                 one image lies in two splits that must be disjoint
    └── ArtifactError                    a model directory
        ├── ArtifactNotFound             no manifest there
        ├── ArtifactCorrupt              a file is missing, foreign, or differs from its digest
        └── GoldenMismatch               the golden inputs do not give the stored answers on this machine

Each class has a `code`: a stable word for programs. The message says what was seen and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class OodgateError(Exception):
    """Root of all errors raised on purpose."""

    code: ClassVar[str] = "oodgate_error"


class ImageError(OodgateError, ValueError):
    """The bytes of one image cannot be used."""

    code = "bad_image"


class TooManyBytes(ImageError):
    """An image is longer than the byte limit."""

    code = "too_many_bytes"

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"the image has {size:,} bytes; the limit is {limit:,}. Send a smaller file.")
        self.size, self.limit = size, limit


class TooManyPixels(ImageError):
    """The header announces more pixels than the limit; no pixel was decoded."""

    code = "too_many_pixels"

    def __init__(self, width: int, height: int, limit: int) -> None:
        super().__init__(
            f"the image announces {width} x {height} = {width * height:,} pixels; the limit is {limit:,}. "
            "Send a smaller image."
        )
        self.width, self.height, self.limit = width, height, limit


class UnsupportedImageFormat(ImageError):
    """An image in a format outside the allow-list."""

    code = "unsupported_image_format"


class UndecodableImage(ImageError):
    """Bytes that are no image, or a truncated or damaged one."""

    code = "undecodable_image"


class BackboneError(OodgateError):
    """A network cannot be used as asked."""

    code = "backbone_error"


class UnknownBackbone(BackboneError):
    """The spec names no network we can build."""

    code = "unknown_backbone"


class UnsafeArchive(BackboneError):
    """A .pt2 archive names a pickled payload, which could run code."""

    code = "unsafe_archive"


class TapNotFound(BackboneError, LookupError):
    """The network has no layer of that name, or no last linear layer."""

    code = "tap_not_found"


class WeightsMismatch(BackboneError, ValueError):
    """A network in memory has other weights than the one that was calibrated."""

    code = "weights_mismatch"


class DataError(OodgateError, ValueError):
    """A data set cannot be used as asked."""

    code = "data_error"


class ClassOrderMismatch(DataError):
    """The labels do not follow the order of the network's outputs."""

    code = "class_order_mismatch"


class EmptyClass(DataError):
    """A class has no image in a set where each class needs one."""

    code = "empty_class"


class ScoreError(OodgateError):
    """A score cannot be fitted or computed."""

    code = "score_error"


class NonFiniteFeatures(ScoreError, ValueError):
    """NaN or infinity came out of the network; `images` are the places in the batch for which it did."""

    code = "non_finite_features"

    def __init__(self, images: Sequence[int], seen: str) -> None:
        super().__init__(f"{seen} NaN or infinity for image {images[0]} of the batch; check the network's weights")
        self.images = frozenset(images)


class CalibrationError(OodgateError):
    """A calibration cannot give what was asked."""

    code = "calibration_error"


class TooFewSamples(CalibrationError, ValueError):
    """The calibration set is too small for the guarantee asked."""

    code = "too_few_samples"


class SplitOverlap(CalibrationError, ValueError):
    """One image lies in two splits that must be disjoint."""

    code = "split_overlap"


class ArtifactError(OodgateError):
    """A model directory cannot be used."""

    code = "artifact_error"


class ArtifactNotFound(ArtifactError, FileNotFoundError):
    """There is no manifest at that place."""

    code = "artifact_not_found"


class ArtifactCorrupt(ArtifactError):
    """A file is missing, foreign, or differs from its digest."""

    code = "artifact_corrupt"


class GoldenMismatch(ArtifactError):
    """The golden inputs do not give the stored answers on this machine."""

    code = "golden_mismatch"
