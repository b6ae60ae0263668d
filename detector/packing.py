# SPDX-License-Identifier: Apache-2.0
"""Convolutions as oneDNN wants them on a CPU: weights laid out once, what follows a convolution done in the same step.

Eager torch lays the weights out anew at every call, which is half the time of a single small image. The operators are
those that torch's own compiler calls; none of them rounds otherwise than the plain form does. But oneDNN's ReLU makes
NaN 0: a network with a weight that is no number would answer, so it is left as it is, and its NaN is found. What is
hidden, as in a compiled form, is a NaN from finite weights, of activations beyond 1e38.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from detector.machine import has_onednn

RELUS = {"call_function": (nn.functional.relu, torch.relu), "call_method": ("relu", "relu_")}
SUMS = (operator.add, torch.add)  # `+=` is recorded as `+`
OPERATORS = (
    "_convolution_pointwise", "_get_mkldnn_serialized_md", "_is_mkldnn_bf16_supported", "_reorder_convolution_weight",
)  # fmt: skip

_Seen = dict[fx.Node, tuple[torch.Size, torch.dtype]]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine has the operators for that dtype: float32, or bfloat16 where the processor multiplies it."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    operators: Any = torch.ops.mkldnn
    if not has_onednn() or not all(hasattr(operators, name) for name in OPERATORS):
        return False
    return dtype == torch.float32 or bool(operators._is_mkldnn_bf16_supported())


def pack(network: fx.GraphModule, example: Tensor) -> None:
    """Replace a traced network's convolutions, and the ReLUs and sums of two tensors that follow them.

    Nothing is replaced where a weight is not finite.

    A sum is only taken along in float32: in bfloat16 the convolution is rounded before it is added.

    Args:
        network: in eval mode, changed in place.
        example: float32 [N, 3, H, W] of any content, of the size of the images to come.
    """
    if not all(bool(torch.isfinite(weight).all()) for weight in network.state_dict().values()):
        return
    seen = _tensors(network, example)
    for node in list(network.graph.nodes):
        module = _module(network, node)
        if type(module) is nn.Conv2d and _can_be_packed(module):
            _replace(network, node, module, seen)
    network.delete_all_unused_submodules()
    network.recompile()


def _tensors(network: fx.GraphModule, example: Tensor) -> _Seen:
    # Not by `Interpreter.run`, which starts a thread of tqdm's that never ends.
    walk, seen = fx.Interpreter(network), _Seen()
    walk.args_iter = iter([example])
    for node in network.graph.nodes:
        value = walk.env[node] = walk.run_node(node)
        if isinstance(value, Tensor):
            seen[node] = value.shape, value.dtype
        for used in walk.user_to_last_uses.get(node, []):
            del walk.env[used]
    return seen


def _can_be_packed(convolution: nn.Conv2d) -> bool:
    known = convolution.weight.dtype in (torch.float32, torch.bfloat16)
    return known and convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


class PackedConv2d(nn.Module):
    """A convolution, then the sum with another tensor and the ReLU where they were asked for.

    Shared out between threads, one image can need another layout than many.
    """

    def __init__(self, convolution: nn.Conv2d, size: torch.Size, *, relu: bool) -> None:
        super().__init__()
        self._geometry = tuple(map(list, (convolution.padding, convolution.stride, convolution.dilation)))
        self._groups, self._relu, self._dtype = convolution.groups, relu, convolution.weight.dtype
        operators: Any = torch.ops.mkldnn
        # Plain attributes: an opaque tensor takes no part in what modules do with their buffers.
        self._for_one, self._for_many = (
            operators._reorder_convolution_weight(
                convolution.weight.detach(), *self._geometry, self._groups, [images, *size[1:]]
            )
            for images in (1, 2)
        )
        if torch.equal(*map(operators._get_mkldnn_serialized_md, (self._for_one, self._for_many))):
            self._for_one = self._for_many  # as for most; the others keep their weights twice
        self._bias = None if convolution.bias is None else convolution.bias.detach()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        operators: Any = torch.ops.mkldnn._convolution_pointwise
        weight = self._for_one if len(x) == 1 else self._for_many
        given = (weight, self._bias, *self._geometry, self._groups)
        x = x.to(self._dtype)
        if other is None:
            alone: Tensor = operators(x, *given, "relu" if self._relu else "none", [], "")
            return alone
        summed: Tensor = operators.binary(x, other, *given, "add", 1.0, "relu" if self._relu else None, [], "")
        return summed


def _replace(network: fx.GraphModule, node: fx.Node, convolution: nn.Conv2d, seen: _Seen) -> None:
    (image,) = node.all_input_nodes
    replaced, given = [node], [image]
    add = _only_user(node)
    if convolution.weight.dtype == torch.float32 and add is not None and _can_be_taken_along(network, add, node, seen):
        given += [other for other in add.all_input_nodes if other is not node]
        replaced.append(add)
    following = _only_user(replaced[-1])
    relu = following is not None and _is_relu(network, following) and not _written_between(network, node, following)
    if following is not None and relu:
        replaced.append(following)
    last, path = replaced[-1], f"packed_{node.name}"
    network.add_submodule(path, PackedConv2d(convolution, seen[image][0], relu=relu))
    with network.graph.inserting_before(last):
        packed = network.graph.call_module(path, tuple(given))
    seen[packed] = seen[last]
    last.replace_all_uses_with(packed)
    for dead in reversed(replaced):
        network.graph.erase_node(dead)


def _can_be_taken_along(network: fx.GraphModule, node: fx.Node, convolution: fx.Node, seen: _Seen) -> bool:
    """Whether it adds two tensors of one shape and dtype, which are not the same."""
    if node.op != "call_function" or node.target not in SUMS or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    if _written_between(network, convolution, node):
        return False
    return len({seen.get(part) for part in (node, *node.all_input_nodes)}) == 1


def _written_between(network: fx.GraphModule, first: fx.Node, last: fx.Node) -> bool:
    """Whether anything between two nodes may write in place: what the first reads, the last could find changed."""
    node = first.next
    while node is not last:
        name = str(getattr(node.target, "__name__", node.target))
        in_place = node.kwargs.get("inplace", False) or getattr(_module(network, node), "inplace", False)
        if in_place or (node.op in ("call_function", "call_method") and name.endswith("_")):
            return True
        node = node.next
    return False


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(network: fx.GraphModule, node: fx.Node) -> bool:
    return node.target in RELUS.get(node.op, ()) or type(_module(network, node)) is nn.ReLU


def _module(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None
