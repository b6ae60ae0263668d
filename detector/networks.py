# SPDX-License-Identifier: Apache-2.0
"""Build a network from its spec, and read weights without executing anything they carry.

cifar_resnet18        the 32x32 ResNet-18 of the OpenOOD protocol; its width is read from the weights
torchvision:NAME      any classifier of torchvision
timm:NAME             any classifier of timm (`pip install oodgate[timm]`)
export:FILE.pt2       a network saved by torch.export with a dynamic batch dimension
"""

from __future__ import annotations

import importlib
import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn

from detector.cifar_resnet import CifarResNet18
from detector.errors import BackboneError, UnknownBackbone, UnsafeArchive
from detector.images import Preprocessing

CIFAR_PREPROCESSING = Preprocessing(
    resize=32, crop=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)
IMAGENET_PREPROCESSING = Preprocessing(resize=256, crop=(224, 224))
_PLAIN_ENTRIES = (
    "archive_format", "archive_version", "byteorder", ".data/", "models/model.json",
    "data/weights/", "data/constants/", "data/sample_inputs/", "extra/",
)  # fmt: skip
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")  # keys that checkpoints hide weights under


class NetworkSpec(BaseModel):
    """What rebuilds a network without its weights; part of the manifest.

    Args:
        kind: cifar_resnet18, torchvision, timm or export.
        name: the network's name within its library.
        num_classes: outputs of the last linear layer.
        width: base channels, of cifar_resnet18 alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    name: str = ""
    num_classes: int = 0
    width: int = 0


def parse_spec(text: str) -> NetworkSpec:
    """Read `KIND` or `KIND:NAME`; raise UnknownBackbone where there is no such kind."""
    kind, _, name = text.partition(":")
    if kind == "cifar_resnet18" and not name:
        return NetworkSpec(kind=kind)
    if kind in ("torchvision", "timm", "export") and name:
        return NetworkSpec(kind=kind, name=name)
    raise UnknownBackbone(
        f"{text!r} is no backbone; use cifar_resnet18, torchvision:NAME, timm:NAME or export:FILE.pt2"
    )


def load_network(spec: NetworkSpec, weights: str | None) -> tuple[nn.Module, NetworkSpec, Preprocessing]:
    """Build the network, give it its weights, and say how its input is prepared.

    Args:
        spec: from `parse_spec`.
        weights: a .safetensors or .pth file; for torchvision also the name of one of its weight enums (downloaded);
            for timm `pretrained` (downloaded); unused for an export.

    Returns:
        the network, the spec completed with class count and width, and the preprocessing its library states.

    Raises:
        UnknownBackbone, UnsafeArchive, BackboneError
    """
    if spec.kind == "export":
        path = Path(spec.name)
        if not path.is_file():
            raise BackboneError(f"there is no file {path}")
        return load_export(path.read_bytes(), str(path)), NetworkSpec(kind="export"), IMAGENET_PREPROCESSING
    if weights is None:
        raise BackboneError(f"{spec.kind} needs weights: a .safetensors or .pth file")
    _refuse_unknown_name(spec)
    if not Path(weights).exists() and spec.kind in ("torchvision", "timm"):
        return _from_hub(spec, weights)
    state = read_weights(Path(weights))
    completed = _completed(spec, state)
    module = build(completed)
    _load_state(module, state)
    return module, completed, default_preprocessing(completed)


def build(spec: NetworkSpec) -> nn.Module:
    """The network of a completed spec with random weights."""
    if spec.kind == "cifar_resnet18":
        return CifarResNet18(spec.num_classes, spec.width)
    if spec.kind == "torchvision":
        models = _library("torchvision").models
        options = {"init_weights": True} if spec.name in ("googlenet", "inception_v3") else {}
        return cast(nn.Module, models.get_model(spec.name, weights=None, num_classes=spec.num_classes, **options))
    if spec.kind == "timm":
        timm = _library("timm")
        return cast(nn.Module, timm.create_model(spec.name, pretrained=False, num_classes=spec.num_classes))
    raise UnknownBackbone(f"{spec.kind!r} cannot be built without its archive")


def default_preprocessing(spec: NetworkSpec) -> Preprocessing:
    """The preprocessing that the network's library states for it."""
    if spec.kind == "torchvision":
        weights = _library("torchvision").models.get_model_weights(spec.name)
        # The first enum is the original recipe; later ones resize differently.
        return _torchvision_preprocessing(next(iter(weights)))
    if spec.kind == "timm":
        timm = _library("timm")
        return _timm_preprocessing(timm.data.resolve_data_config(pretrained_cfg=_timm_config(timm, spec.name)))
    return CIFAR_PREPROCESSING


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, or from a checkpoint opened with `weights_only`.

    Raises:
        BackboneError: the file is missing, or holds no tensors.
    """
    if not path.is_file():
        raise BackboneError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds here, pickle's own among them
        raise BackboneError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(name).removeprefix("module."): value for name, value in dict(content).items() if _is_tensor(value)}
    if not tensors:
        raise BackboneError(f"{path} holds no tensors")
    return tensors


def load_export(archive: bytes, name: str) -> nn.Module:
    """Open a torch.export archive as a module whose layers can be hooked.

    Args:
        archive: the bytes of the .pt2 file.
        name: what to call it in messages.

    Raises:
        UnsafeArchive: its index names a pickled payload, which opening would execute.
        BackboneError: not an archive of torch.export.
    """
    refuse_pickles(archive, name)
    try:
        with warnings.catch_warnings():
            # torch warns of its own read-only buffers and deprecated tree specs.
            warnings.simplefilter("ignore")
            return torch.export.unflatten(torch.export.load(io.BytesIO(archive)))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise BackboneError(f"{name} cannot be opened as a torch.export archive: {error}") from error


def refuse_pickles(archive: bytes, name: str) -> None:
    """Read a .pt2 archive's index and refuse all that opening it could execute.

    Raises:
        UnsafeArchive: a tensor or object stored by pickle, sample inputs (stored by pickle), compiled code, or any
            entry that a plain exported program does not have.
        BackboneError: not an archive of torch.export.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as index:
            entries = {item.filename.partition("/")[2]: item for item in index.infolist()}
            archive_format = index.read(entries["archive_format"]) if "archive_format" in entries else b""
            configs = [index.read(item) for entry, item in entries.items() if entry.endswith("_config.json")]
    except (zipfile.BadZipFile, OSError) as error:
        raise BackboneError(f"{name} is no .pt2 archive: {error}") from error
    if archive_format != b"pt2":
        raise BackboneError(f"{name} is no .pt2 archive of torch.export (torch 2.11 or newer)")
    if any(item.file_size for entry, item in entries.items() if entry.startswith("data/sample_inputs/")):
        raise UnsafeArchive(
            f"{name} holds sample inputs, which are stored by pickle and could run code; "
            "save it again after `program.example_inputs = None`"
        )
    foreign = [entry for entry in entries if not entry.startswith(_PLAIN_ENTRIES)]
    if foreign or any(_names_pickle(config) for config in configs):
        raise UnsafeArchive(
            f"{name} names a pickled or executable payload ({', '.join(foreign) or 'use_pickle'}), "
            "which could run code; export the network again without custom objects"
        )


def _names_pickle(config: bytes) -> bool:
    try:
        payloads = json.loads(config)["config"]
        return any(payload["use_pickle"] is not False for payload in payloads.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return True  # an index that cannot be read proves nothing


def export_network(module: nn.Module, preprocessing: Preprocessing) -> bytes:
    """A network that no spec names as a torch.export archive with a dynamic batch dimension.

    Raises:
        BackboneError: torch.export cannot trace it.
    """
    example = torch.zeros(2, 3, *preprocessing.crop)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with torch.no_grad():
            program = torch.export.export(module.cpu().eval(), (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises many kinds, all meaning the same here
        raise BackboneError(f"torch.export cannot trace the network: {str(error).splitlines()[0]}") from error
    program.example_inputs = None  # they would be stored as a pickle
    archive = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of tensors that share memory
        torch.export.save(program, archive)
    return archive.getvalue()


def _refuse_unknown_name(spec: NetworkSpec) -> None:
    if spec.kind == "torchvision" and spec.name not in _library("torchvision").models.list_models():
        raise UnknownBackbone(f"torchvision has no model {spec.name!r}")
    if spec.kind == "timm" and not _library("timm").is_model(spec.name):
        raise UnknownBackbone(f"timm has no model {spec.name!r}")


def _completed(spec: NetworkSpec, state: dict[str, Tensor]) -> NetworkSpec:
    if spec.kind == "cifar_resnet18":
        if "conv1.weight" not in state or "fc.weight" not in state:
            raise BackboneError("the weights are not those of cifar_resnet18: conv1.weight or fc.weight is missing")
        width, classes = state["conv1.weight"].shape[0], state["fc.weight"].shape[0]
        return spec.model_copy(update={"width": width, "num_classes": classes})
    head = _head_of(spec)
    if f"{head}.weight" not in state:
        raise BackboneError(f"the weights have no {head}.weight, the last layer of {spec.name}")
    return spec.model_copy(update={"num_classes": state[f"{head}.weight"].shape[0]})


def _head_of(spec: NetworkSpec) -> str:
    with torch.device("meta"):
        skeleton = build(spec.model_copy(update={"num_classes": 7}))
    # The last linear layer defined is the head in every torchvision and timm classifier; Backbone checks it by running.
    modules = skeleton.named_modules()
    sized: list[str] = [name for name, module in modules if isinstance(module, nn.Linear) and module.out_features == 7]
    if not sized:
        raise BackboneError(f"{spec.name} does not end in a linear layer; GROOD needs logits = W h + b")
    return sized[-1]


def _load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise BackboneError(f"the weights do not fit the network: {' '.join(str(error).split())[:500]}") from error


def _from_hub(spec: NetworkSpec, weights: str) -> tuple[nn.Module, NetworkSpec, Preprocessing]:
    if spec.kind == "torchvision":
        models = _library("torchvision").models
        enums = {member.name: member for member in models.get_model_weights(spec.name)}
        if weights not in enums:
            raise BackboneError(f"{weights!r} is neither a file nor one of torchvision's weights: {', '.join(enums)}")
        chosen = enums[weights]
        with _fetching(weights, chosen.url):
            module = cast(nn.Module, models.get_model(spec.name, weights=chosen))
        completed = spec.model_copy(update={"num_classes": len(chosen.meta["categories"])})
        return module, completed, _torchvision_preprocessing(chosen)
    if weights != "pretrained":
        raise BackboneError(f"there is no weights file {weights}; timm's own weights are called `pretrained`")
    timm = _library("timm")
    with _fetching(f"{weights} of {spec.name}", "timm's hub"):
        module = cast(nn.Module, timm.create_model(spec.name, pretrained=True))
    completed = spec.model_copy(update={"num_classes": int(cast(Any, module).num_classes)})
    return module, completed, _timm_preprocessing(timm.data.resolve_model_data_config(module))


@contextmanager
def _fetching(weights: str, source: str) -> Iterator[None]:
    """Turn what the network or the disk refuses into a BackboneError that names the source."""
    try:
        yield
    except OSError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BackboneError(
            f"the weights {weights} could not be fetched from {source}: {reason}. "
            "Give a local .safetensors or .pth file as --weights instead"
        ) from error


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
    transforms = weights.transforms()
    crop = int(transforms.crop_size[0])
    return Preprocessing(
        resize=int(transforms.resize_size[0]),
        crop=(crop, crop),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _timm_config(timm: Any, name: str) -> Any:
    config = timm.get_pretrained_cfg(name)
    return config.to_dict() if config is not None else {}


def _timm_preprocessing(config: dict[str, Any]) -> Preprocessing:
    _, height, width = config["input_size"]
    return Preprocessing(
        resize=int(min(height, width) / config["crop_pct"]),
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackboneError(f"this backbone needs {name}: pip install 'oodgate[{name}]'") from error


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
