# SPDX-License-Identifier: Apache-2.0
"""A network and its taps: uint8 images -> Outputs(logits, penultimate, early, inputs).

Resuming from the early layer is a forward hook that replaces its output: one mechanism for every network.
Plain outputs come from the lean form of the network (`forward.py`), which has no hooks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from detector.errors import BackboneError, DataError, NonFiniteFeatures, TapNotFound
from detector.forward import Forward, Precision as Precision
from detector.images import Preprocessing
from detector.outputs import Outputs
from detector.sharing import shared_out
from detector.staging import Staging
from detector.taps import UNDISTURBED, find_early, find_head, layer, of_this_thread

log = logging.getLogger(__name__)

Mode = Literal["eager", "compiled", "recorded"]

AGREEMENT: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.1}  # of the largest feature
SHARED_FROM = 50_000  # weights; a smaller network is done before a second thread is awake


class Run(Protocol):
    """A form of the network: uint8 [N, H, W, 3] on the device -> logits [N, C], penultimate [N, D], float32.

    Where it has an attribute `reentrant` that is true, threads may run it at the same time.
    """

    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]: ...


class Backbone:
    """A network in eval mode with its taps.

    Args:
        module: float images [N, 3, H, W] -> logits [N, C]. It is taken over: eval mode, frozen, channels-last.
        preprocessing: the size, mean and std of its input.
        head: path of the last linear layer; found where not given.
        early: path of the layer that the mix-up resumes from; the first of EARLY_CANDIDATES where not given.
        device, precision: where and how the forward runs. bf16 is autocast; the last linear layer is always float32.
        rebuild: makes the module again; lets `release` free it.

    Raises:
        TapNotFound: no last linear layer, or no layer of that name.
        BackboneError: the penultimate tap is not one vector per image.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocessing: Preprocessing,
        *,
        head: str | None = None,
        early: str | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        rebuild: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.precision: Precision = precision
        self.mode: Mode = "eager"
        self.preprocessing = preprocessing
        self._rebuild = rebuild
        self._one_builds = threading.Lock()
        self._network: nn.Module | None = self._prepared(module)
        scale = torch.tensor([preprocessing.mean, preprocessing.std], device=self.device).mul(255).view(2, 3, 1, 1)
        self._mean, self._std = scale
        self.head = head or find_head(module, torch.zeros(2, 3, *preprocessing.crop, device=self.device))
        head_module = self._layer(self.head)
        self.weight: Tensor = head_module.get_parameter("weight").float()  # [C, D]
        bias = getattr(head_module, "bias", None)
        self.bias: Tensor = bias.float() if isinstance(bias, Tensor) else self.weight.new_zeros(len(self.weight))
        self.early = early or find_early(module)
        self._layer(self.early)
        weights = sum(parameter.numel() for parameter in module.parameters())
        self._shared_out = self.device.type == "cpu" and weights >= SHARED_FROM
        self._staging = Staging(self.input_shape, self.device) if self.device.type == "cuda" else None
        self._one_at_a_time = threading.Lock()  # hooks live on the module: two passes at once would mix their taps

    @property
    def module(self) -> nn.Module:
        """The network itself; built again where it was released."""
        with self._one_builds, torch.inference_mode(False):  # else its weights could take part in no gradient
            if self._network is None:
                if self._rebuild is None:
                    raise AssertionError("only a network that can be built again is released")
                self._network = self._prepared(self._rebuild())
            return self._network

    @cached_property
    def forward(self) -> Run:
        """The form of the network that gives plain outputs."""
        form = self.lean()
        if self.device.type == "cpu":
            form.pack()
        if form.folded and not self._agrees(form):
            log.warning("the network runs as it is, which is slower: traced by torch.fx it gives other features")
            return self.lean(whole=True)
        return form

    def lean(self, *, whole: bool = False) -> Forward:
        """The lean form of the network, which a compiler can take; or, `whole`, as it is."""
        parts = self.module, self.head, self.weight, self.bias, self.preprocessing, self.precision
        return Forward(*parts, whole=whole)

    @property
    def runs_whole(self) -> bool:
        """Whether plain outputs come from the network as it is."""
        return isinstance(self.forward, Forward) and not self.forward.folded

    def _agrees(self, form: Forward) -> bool:
        # What torch.fx records of `x += y`, say, is another step wherever x goes by a second name.
        noise = torch.randint(0, 256, (2, *self.input_shape), generator=torch.Generator().manual_seed(0))
        images = noise.to(self.device, torch.uint8)
        with self._alone(), torch.inference_mode():
            expected, found = self._penultimate(self.normalised(images)), form(images)[1]
        allowed = AGREEMENT[self.precision] * float(expected.abs().max())
        return not bool(((found - expected).abs() > allowed).any())  # NaN is found by whoever runs it

    def with_forward(self, forward: Run, mode: Mode) -> Self:
        """The same backbone with plain outputs from another form of the network."""
        other = copy(self)
        other.forward, other.mode = forward, mode
        return other

    def release(self) -> None:
        """Free the network where plain outputs do without it; what needs it builds it again."""
        if self._rebuild is not None and isinstance(self.forward, Forward) and self.forward.folded:
            self._network = None

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of one image."""
        return (*self.preprocessing.crop, 3)

    def outputs(self, images: Tensor, *, early: bool = False, checked: bool = True) -> Outputs:
        """Run the network on uint8 images.

        Args:
            images: uint8 [N, H, W, 3].
            early: also return the early layer's output.
            checked: look whether all that comes out is finite, for which the host waits until the device is done.

        Raises:
            DataError: wrong dtype or shape.
            NonFiniteFeatures: NaN or infinity came out of the network, and it was looked for.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.input_shape:
            seen = f"{images.dtype} {tuple(images.shape)}"
            raise DataError(f"the network takes uint8 [N, {', '.join(map(str, self.input_shape))}]; got {seen}")
        if len(images) == 0:
            empty = self.weight.new_zeros
            return Outputs(empty(0, self.num_classes), empty(0, self.weight.shape[1]), inputs=images)
        with torch.inference_mode():
            on_device = images
            if early:
                logits, penultimate, tapped = self._with_early(images)
            else:
                on_device = images if self._staging is None else self._staging.upload(images)
                forward, tapped = self.forward, None  # made before it runs: making it may trace
                # The network as it is must not run while another pass has its hooks on it.
                with self._alone() if self.runs_whole else UNDISTURBED.running():
                    if self._shared_out and getattr(forward, "reentrant", False):
                        logits, penultimate = shared_out(forward, on_device)
                    else:
                        logits, penultimate = forward(on_device)
        if checked:
            _refuse_non_finite(logits)
        return Outputs(logits, penultimate, tapped, inputs=on_device, checked=checked)

    def outputs_of(self, x: Tensor) -> Outputs:
        """Run the network itself on its own input, float [N, 3, H, W], as from `normalised`; raises as `outputs`.

        The outputs carry the images that are nearest to it.
        """
        with self._alone(), torch.inference_mode():
            penultimate = self._penultimate(x)
            logits = torch.addmm(self.bias, penultimate, self.weight.T)
        _refuse_non_finite(logits)
        images = (x * self._std + self._mean).round().clamp(0, 255).byte().movedim(1, -1)
        return Outputs(logits, penultimate, inputs=images)

    def resume(self, early: Tensor) -> Tensor:
        """Run the rest of the network from the early layer's output.

        Args:
            early: float [N, ...], as `Outputs.early`.

        Returns:
            float32 [N, D], the penultimate features.
        """
        height, width, channels = self.input_shape
        unused = torch.zeros(len(early), channels, height, width, device=self.device)

        def replace_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return early.to(self.device, output.dtype)

        with self._alone(), torch.inference_mode():
            handle = self._layer(self.early).register_forward_hook(of_this_thread(replace_output))
            try:
                return self._penultimate(unused)
            finally:
                handle.remove()

    def differentiable(self, images: Tensor, layers: Sequence[str] = ()) -> tuple[Outputs, dict[str, Tensor]]:
        """Run the network so that gradients can be taken: float32 whatever the precision, parameters frozen.

        Args:
            images: uint8 [N, H, W, 3].
            layers: paths of modules.

        Returns:
            logits and penultimate, and by path the outputs of the layers that ran, all of one graph; a layer that runs
            twice gives its last output.

        Raises:
            TapNotFound: no layer of that name.
        """
        taps: dict[str, Tensor] = {}

        def keep_output(path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                taps[path] = output
                return output.clone()  # what follows may work in place

            return keep

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            taps["penultimate of the head"] = inputs[0]

        with self._alone(), torch.inference_mode(False), torch.enable_grad():
            handles = [self._layer(path).register_forward_hook(of_this_thread(keep_output(path))) for path in layers]
            handles.append(self._layer(self.head).register_forward_pre_hook(of_this_thread(keep_input)))
            try:
                self.module(self.normalised(images).requires_grad_())
            finally:
                for handle in handles:
                    handle.remove()
            penultimate = taps.pop("penultimate of the head")
            return Outputs(torch.addmm(self.bias, penultimate, self.weight.T), penultimate), taps

    def functional(self, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Logits float32 [N, C] as a function of parameters, for `torch.func`; those not named keep their values.

        Args:
            parameters: by their names in the network.
            images: uint8 [N, H, W, 3].
        """
        with self._alone():
            x = self.normalised(images).contiguous()
            logits: Tensor = functional_call(self.module, dict(parameters), (x,))
        return logits

    def check_resume(self, images: Tensor) -> None:
        """Prove on real images that the network has no path around its early layer.

        Raises:
            BackboneError: resuming from the early layer does not give the features of the whole forward.
        """
        outputs = self.outputs(images, early=True)
        if outputs.early is None:
            raise TapNotFound(f"the layer {self.early!r} did not run in the forward pass; choose another early layer")
        error = (self.resume(outputs.early) - outputs.penultimate).abs().max()
        if error > 1e-3 * outputs.penultimate.abs().max():
            raise BackboneError(
                f"features resumed from {self.early!r} differ by {float(error):.3g} from the forward pass: "
                "the network has a path around that layer; choose another early layer"
            )

    def normalised(self, images: Tensor) -> Tensor:
        """Images uint8 [N, H, W, 3] -> the network's input, float32 [N, 3, H, W] on its device."""
        pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        normalised: Tensor = (pixels.float() - self._mean) / self._std
        return normalised

    def _penultimate(self, x: Tensor) -> Tensor:
        taps: dict[str, Tensor] = {}

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            taps["penultimate"] = inputs[0]

        handle = self._layer(self.head).register_forward_pre_hook(of_this_thread(keep_input))
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                self.module(x)
        finally:
            handle.remove()
        penultimate = taps["penultimate"].float()
        if penultimate.ndim != 2:
            shape = tuple(penultimate.shape)
            raise BackboneError(f"the input of {self.head!r} has shape {shape}; one vector per image is needed")
        return penultimate

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While the network itself runs, with hooks on it."""
        _ = self.module  # made before it runs, where it was released
        with self._one_at_a_time, UNDISTURBED.running():
            yield

    def _with_early(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        taps: dict[str, Tensor] = {}

        def keep_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
            taps["early"] = output.float()

        with self._alone():
            handle = self._layer(self.early).register_forward_hook(of_this_thread(keep_output))
            try:
                penultimate = self._penultimate(self.normalised(images))
            finally:
                handle.remove()
        return torch.addmm(self.bias, penultimate, self.weight.T), penultimate, taps.get("early")

    def _prepared(self, module: nn.Module) -> nn.Module:
        # An unflattened export has neither mode and refuses nothing: its graph was recorded in eval mode.
        module.train(False)
        module.requires_grad_(False).to(self.device)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing from torch's stubs
        return module

    def _layer(self, path: str) -> nn.Module:
        return layer(self.module, path)


def _refuse_non_finite(logits: Tensor) -> None:
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        raise NonFiniteFeatures((~finite).nonzero().flatten().tolist(), "the network gave")
