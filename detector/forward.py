# SPDX-License-Identifier: Apache-2.0
"""The network as it serves: uint8 images -> logits and penultimate features, nothing else on the way.

Where torch.fx can trace the network, batch norms are folded into the convolutions before them and the last linear
layer is cut off; where it cannot, the network runs as it is and a hook takes the features. The scores that decide are
fitted and calibrated through this form too. Taps and gradients use the network itself.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detector.errors import BackboneError
from detector.images import Preprocessing
from detector.packing import can_pack, pack
from detector.taps import UNDISTURBED, of_this_thread

Precision = Literal["fp32", "bf16"]


class Forward(nn.Module):
    """Normalisation, network and last linear layer in one module.

    Args:
        module: float images [N, 3, H, W] -> logits; in eval mode, on its device. It is not changed.
        head: path of its last linear layer.
        weight, bias: of that layer, float32 [C, D] and [C].
        preprocessing: mean and std of the input.
        precision: bf16 is autocast; the last linear layer is always float32.
        whole: run the network as it is, whether or not it can be traced.

    Input: uint8 [N, H, W, 3] on the device. Output: logits float32 [N, C], penultimate float32 [N, D].

    Raises:
        BackboneError: at a call, where the penultimate features are not one vector per image.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        module: nn.Module,
        head: str,
        weight: Tensor,
        bias: Tensor,
        preprocessing: Preprocessing,
        precision: Precision,
        *,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.head, self.autocast, self.crop = head, precision == "bf16", preprocessing.crop
        traced = None if whole else _without_head(module, head)
        self.folded = self.reentrant = traced is not None
        self.network: nn.Module = _Watched(module, head) if traced is None else traced
        if self.autocast and traced is not None:
            _store_as_bfloat16(traced)
        scale = torch.tensor([preprocessing.mean, preprocessing.std], device=weight.device).mul(255).view(2, 3, 1, 1)
        for name, value in (("mean", scale[0]), ("std", scale[1]), ("weight", weight), ("bias", bias)):
            self.register_buffer(name, value.detach())
        self.train(False)

    def pack(self) -> None:
        """Make it as fast as this CPU can run it eagerly, where that is known; then it can be exported no more."""
        if not isinstance(self.network, fx.GraphModule) or not can_pack(
            torch.bfloat16 if self.autocast else torch.float32
        ):
            return
        example = torch.zeros(1, 3, *self.crop).contiguous(memory_format=torch.channels_last)
        with UNDISTURBED.running(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            pack(self.network, example)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            penultimate = self.network(x)
        if penultimate.ndim != 2:
            shape = tuple(penultimate.shape)
            raise BackboneError(f"the input of {self.head!r} has shape {shape}; one vector per image is needed")
        penultimate = penultimate.float()
        return torch.addmm(self.bias, penultimate, self.weight.T), penultimate


class _Watched(nn.Module):
    """A network run whole, its features taken by a hook: one pass at a time, for the hook lives on the module."""

    def __init__(self, module: nn.Module, head: str) -> None:
        super().__init__()
        self.module, self.head = module, head

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        handle = self.module.get_submodule(self.head).register_forward_pre_hook(of_this_thread(keep_input))
        try:
            self.module(x)
        finally:
            handle.remove()
        return seen[-1]


def _without_head(module: nn.Module, head: str) -> fx.GraphModule | None:
    """The network up to the input of its head, batch norms folded; None where torch.fx cannot trace it."""
    try:
        with UNDISTURBED.tracing():
            traced = fx.symbolic_trace(module)
    except Exception:  # tracing runs the network's own code on stand-ins, which may raise anything
        return None
    calls = [node for node in traced.graph.nodes if node.op == "call_module" and node.target == head]
    if len(calls) != 1:
        return None
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    output.args = (calls[0].args[0],)
    _fold_batch_norms(traced)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _fold_batch_norms(traced: fx.GraphModule) -> None:
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        convolution, norm = traced.get_submodule(str(source.target)), traced.get_submodule(str(node.target))
        if calls[source.target] != 1 or calls[node.target] != 1:
            continue
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            traced.set_submodule(str(source.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(source)


def _store_as_bfloat16(traced: fx.GraphModule) -> None:
    """Keep the weights as autocast would cast them at every call."""
    # Only what the graph itself calls: what is inside of that still belongs to the network that was traced.
    for path in {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}:
        part = traced.get_submodule(path)
        if isinstance(part, nn.Conv2d | nn.Linear):
            traced.set_submodule(path, deepcopy(part).to(torch.bfloat16))
