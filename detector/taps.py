# SPDX-License-Identifier: Apache-2.0
"""Reach into a network: its layers by path, hooks that keep to their thread, and runs kept apart from traces.

The last linear layer is found by watching one forward pass, so no architecture needs a special case.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detector.errors import BackboneError, TapNotFound

T = TypeVar("T")

# The first that exists: ResNets, then MobileNets, ConvNeXt and Swin of torchvision, ViT, then the names of timm.
EARLY_CANDIDATES = (
    "layer1", "features.1", "encoder.layers.encoder_layer_2", "stages.0", "layers.0", "blocks.0",
)  # fmt: skip


class Undisturbed:
    """Keeps runs of networks and traces of torch.fx apart.

    While it traces, torch.fx replaces `nn.Module.__call__` for the whole process, so a network that another thread runs
    then would be recorded, or break. Runs do not wait for each other; a trace waits for them, and new ones for it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running, self._wanted = 0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a network runs; not to be entered again inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While torch.fx traces."""
        with _ONE_TRACE, self._changed:
            self._wanted += 1
            try:
                self._changed.wait_for(lambda: not self._running)
                yield
            finally:
                self._wanted -= 1
                self._changed.notify_all()


_ONE_TRACE = threading.Lock()
UNDISTURBED = Undisturbed()


def of_this_thread(hook: Callable[..., T]) -> Callable[..., T | None]:
    """A hook that heeds only the thread that made it: the network may be an application's own, at work elsewhere."""
    thread = threading.get_ident()
    return lambda *given: hook(*given) if threading.get_ident() == thread else None


def layer(module: nn.Module, path: str) -> nn.Module:
    """A layer of a network by its path; TapNotFound where there is none."""
    try:
        found: nn.Module = module.get_submodule(path)
        return found
    except AttributeError:
        names = ", ".join(name for name, _ in module.named_modules() if name and name.count(".") < 2)
        raise TapNotFound(f"the network has no layer {path!r}; it has {names}") from None


def find_head(module: nn.Module, example: Tensor) -> str:
    """The path of the last linear layer.

    Args:
        module: in eval mode.
        example: its input, float [N, 3, H, W] of any content.

    Raises:
        TapNotFound: the logits are not the output of a linear layer.
        BackboneError: the network does not return one tensor.
    """
    found: list[tuple[str, Tensor]] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.append((path, output))

        return keep

    handles = [
        part.register_forward_hook(of_this_thread(watch(path)))
        for path, part in module.named_modules()
        if _is_linear(part)
    ]
    # Not inference mode: an in-place operation of the network on its own buffers must stay possible.
    try:
        with UNDISTURBED.running(), torch.no_grad():
            logits = module(example)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor):
        raise BackboneError(f"the network must return its logits as one tensor; it returned {type(logits).__name__}")
    for path, output in reversed(found):
        if output.shape == logits.shape and torch.equal(output, logits):
            return path
    raise TapNotFound("the logits are not the output of a linear layer; GROOD needs logits = W h + b")


def find_early(module: nn.Module) -> str:
    """The path of the usual early layer; TapNotFound where the network has none of the usual names."""
    names = {name for name, _ in module.named_modules()}
    for candidate in EARLY_CANDIDATES:
        if candidate in names:
            return candidate
    known = ", ".join(EARLY_CANDIDATES)
    raise TapNotFound(f"none of the usual early layers ({known}) exists here; name one with --early-layer")


def _is_linear(module: nn.Module) -> bool:
    # By its parameters rather than its class: an unflattened export has modules of its own class.
    parameters = dict(module.named_parameters(recurse=False))
    return "weight" in parameters and parameters["weight"].ndim == 2 and set(parameters) <= {"weight", "bias"}
