# SPDX-License-Identifier: Apache-2.0
"""Convolutions in oneDNN's own layout: which are replaced, and that their answers stay."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from detector import packing
from detector.backbone import Backbone
from detector.cifar_resnet import CifarResNet18
from detector.forward import Forward, Precision
from detector.networks import CIFAR_PREPROCESSING
from detector.packing import PackedConv2d, can_pack, pack
from tests.helpers import toy_images, toy_network

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="no x86 processor with AVX2, or no oneDNN")


class Around(nn.Module):
    """Two convolutions with whatever stands around the second."""

    def __init__(self, second: nn.Conv2d, around: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.around = nn.Conv2d(3, 8, 3, padding=1), second, around

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.second, self.first(x))


def convolution(**options: object) -> nn.Conv2d:
    made: nn.Conv2d = nn.Conv2d(8, 8, 3, **({"padding": 1} | options))  # type: ignore[arg-type]
    return made


def packed(module: nn.Module) -> tuple[fx.GraphModule, Tensor, Tensor]:
    """The packed network, its answers, and those of the network as it was."""
    torch.manual_seed(0)
    images = torch.randn(3, 3, 12, 10).contiguous(memory_format=torch.channels_last)
    module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing from torch's stubs
    with torch.no_grad():
        traced = fx.symbolic_trace(module)
        expected = module(images)
        pack(traced, torch.zeros(2, 3, 12, 10))
        return traced, traced(images), expected


def kinds(network: fx.GraphModule) -> list[str]:
    """What is left of the graph, in order."""
    found = []
    for node in network.graph.nodes:
        if node.op == "call_module":
            found.append(type(network.get_submodule(str(node.target))).__name__)
        elif node.op in ("call_function", "call_method"):
            found.append(str(getattr(node.target, "__name__", node.target)))
    return found


def summed_in_place(conv: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = conv(x)
    y += x
    return y


def changed_before_the_sum(conv: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = conv(x)
    x.mul_(2.0)
    return torch.relu(y + x)


FOLLOWED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str]]] = {
    "nothing": (lambda conv, x: conv(x), []),
    "relu": (lambda conv, x: torch.relu(conv(x)), []),
    "a relu in place": (lambda conv, x: conv(x).relu_(), []),
    "a sum": (lambda conv, x: conv(x) + x, []),
    "a sum and a relu": (lambda conv, x: torch.relu(x + conv(x)), []),
    "a sum in place": (summed_in_place, []),
    "a sum with what comes later": (lambda conv, x: torch.relu(conv(x) + x.sigmoid()), ["sigmoid"]),
    "a sum whose operand is used again": (lambda conv, x: (conv(x) + x) * x, ["mul"]),
    "two uses": (lambda conv, x: torch.relu(y := conv(x)) * y, ["relu", "mul"]),
    "a sum with itself": (lambda conv, x: (y := conv(x)) + y, ["add"]),
    "a sum that broadcasts": (lambda conv, x: conv(x) + x.mean((2, 3), keepdim=True), ["mean", "add"]),
    "a sum with a number": (lambda conv, x: conv(x) + 1.0, ["add"]),
    "a scaled sum": (lambda conv, x: torch.add(conv(x), x, alpha=2.0), ["add"]),
    "a sum with what was changed in place": (changed_before_the_sum, ["mul_", "add", "relu"]),
    "another activation": (lambda conv, x: torch.sigmoid(conv(x)), ["sigmoid"]),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_follows_a_convolution_is_taken_along_where_nothing_else_needs_it(name: str) -> None:
    around, left = FOLLOWED[name]
    network, found, expected = packed(Around(convolution(), around))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert sorted(kinds(network)) == sorted(["PackedConv2d", "PackedConv2d", *left])


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.SiLU(), nn.Identity(), nn.ReLU6()])
def test_an_attribute_named_relu_is_known_by_what_it_is(activation: nn.Module) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 8, 3), activation

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.relu(self.conv(x))
            return found

    network, found, expected = packed(Named())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert kinds(network) == ["PackedConv2d", type(activation).__name__]


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilation": 2}, {"groups": 8}, {"groups": 2}, {"bias": False}, {"padding": 0}]
)
def test_every_geometry_gives_the_same_answers(options: dict[str, object]) -> None:
    _, found, expected = packed(Around(convolution(**options), lambda conv, x: conv(x)))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding_mode": "reflect"}])
def test_a_padding_that_is_a_step_of_its_own_is_left(options: dict[str, object]) -> None:
    network, found, expected = packed(Around(convolution(**options), lambda conv, x: conv(x)))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert kinds(network) == ["PackedConv2d", "Conv2d"]


def test_a_convolution_that_runs_twice_is_packed_twice() -> None:
    network, found, expected = packed(Around(convolution(), lambda conv, x: conv(conv(x).relu())))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert kinds(network) == ["PackedConv2d"] * 3


def test_a_network_with_a_weight_that_is_no_number_is_left_so_that_its_answers_are_none() -> None:
    module = Around(convolution(), lambda conv, x: torch.relu(conv(x)))
    with torch.no_grad():
        module.first.weight[0] = torch.nan
    network, found, _ = packed(module)
    assert kinds(network) == ["Conv2d", "Conv2d", "relu"]
    assert bool(found.isnan().any())


def form(backbone: Backbone) -> Forward:
    assert isinstance(backbone.forward, Forward)
    return backbone.forward


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_the_answers_of_a_network_stay(precision: Precision, n: int) -> None:
    if precision == "bf16" and not can_pack(torch.bfloat16):
        pytest.skip("the processor does not multiply in bfloat16")
    backbone = Backbone(toy_network().module, CIFAR_PREPROCESSING, precision=precision)
    images = torch.from_numpy(toy_images(n, seed=0)[0])
    assert any(isinstance(part, PackedConv2d) for part in form(backbone).modules())
    outputs = backbone.outputs(images)
    with torch.no_grad():
        logits, penultimate = backbone.lean()(images)
    # bfloat16 rounds at the same places, so that what was calibrated before stays what is compared.
    bound = 1e-5 * float(logits.abs().max())
    assert float((outputs.logits - logits).abs().max()) <= bound
    assert torch.allclose(outputs.penultimate, penultimate, rtol=1e-5, atol=1e-5)


def test_packing_starts_no_thread() -> None:
    before = set(threading.enumerate())
    packed(Around(convolution(), lambda conv, x: conv(x)))
    assert set(threading.enumerate()) == before


def test_without_the_operators_the_network_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "has_onednn", lambda: False)
    backbone = Backbone(CifarResNet18(5, 8), CIFAR_PREPROCESSING)
    assert not any(isinstance(part, PackedConv2d) for part in form(backbone).modules())
    assert backbone.outputs(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).logits.shape == (2, 5)


def test_what_a_compiler_takes_is_not_packed() -> None:
    backbone = Backbone(CifarResNet18(5, 8), CIFAR_PREPROCESSING)
    backbone.outputs(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert not any(isinstance(part, PackedConv2d) for part in backbone.lean().modules())
