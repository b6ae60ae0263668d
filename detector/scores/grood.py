# SPDX-License-Identifier: Apache-2.0
"""GROOD (ElAraby et al., arXiv 2312.14427): the gradient of a nearest-prototype loss at one synthetic OOD prototype.

With class prototypes p_1..p_C (class means of the penultimate features h) and an OOD prototype q,

    s_k = -||h - p_k||,  k = 1..C, and s_q = -||h - q||        no temperature, not squared
    pi  = softmax(s_1..s_C, s_q),  L(h) = -log pi_y            y a class, never the OOD slot
    g(h) = dL/dq = pi_q (h - q) / ||h - q||                     so ||g|| = pi_q, and y does not matter

`grood` scores an image by the Euclidean distance from g(h) to the nearest gradient of a correctly classified training
image; `grood_norm` by ||g(h)||_1, which needs no training gradients. `grood_w`, `grood_margin`, `grood_margin_w` and
those whose q is always of noise, `grood_noise` and `grood_margin_noise`, are our own forms.
"""

from __future__ import annotations

import hashlib
from functools import partial
from math import log
from typing import ClassVar, Self

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.errors import ScoreError
from detector.outputs import Outputs
from detector.scores import index
from detector.scores.base import FitOptions, Gatherer, Score, State, register
from detector.scores.gather import ClassSums, CorrectFeatures, EarlyMaps, Scatter
from detector.scores.index import NearestIndex
from detector.scores.nearest import CHUNK_CELLS, close, exact_distances, in_parts, products

ROUNDING = 1e-5  # of a squared distance in float32, in units of the squared gradient
CANDIDATES = 16  # rows that an index finds, of which the nearest counts
LONGEST = 1e8  # of a gradient of the bank, in units of an image's; one so long is never the nearest
SAFE_NORM = 1e-30  # a float32 gradient this short still has its direction
GENERATORS = ("mixup", "noise", "prototype_mean", "images")
OUR_MIXUP = 0.8  # lambda of our own forms
DEFAULT_SHRINKAGE, DEFAULT_TEMPERATURE = 0.1, 0.5
SHRINKAGES = tuple(10 ** (exponent / 4) for exponent in range(-16, 1))
TEMPERATURES = tuple(2 ** (exponent / 4) for exponent in range(-24, 9))


def grood_gradient(features: Tensor, prototypes: Tensor, ood_prototype: Tensor) -> tuple[Tensor, Tensor]:
    """The closed form of dL/dq for a batch.

    Args:
        features: [N, D].
        prototypes: [C, D].
        ood_prototype: [D].

    Returns:
        unit direction float64 [N, D] and log pi_q float64 [N]; the gradient is exp(log pi_q) x direction.
    """
    h, q = features.double(), ood_prototype.double()
    return _gradient(h, q, exact_distances(h, torch.vstack([prototypes.double(), q])))


def _gradient(h: Tensor, q: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    log_pi = torch.log_softmax(-distances, dim=1)[:, -1]
    direction = (h - q) / distances[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    return direction, log_pi


def gradient_bank(features: Tensor, prototypes: Tensor, ood_prototype: Tensor) -> Tensor:
    """Gradients [B, D] of training features [B, D]: float32, or float64 where one is too short for float32."""
    direction, log_pi = grood_gradient(features, prototypes, ood_prototype)
    bank = log_pi.exp()[:, None] * direction
    return bank.float() if bool((log_pi.exp() >= SAFE_NORM).all()) else bank


def _polar(bank: Tensor) -> tuple[Tensor, Tensor]:
    """Unit directions float32 [B, D] and log lengths float64 [B] of gradients [B, D]."""
    tiny = torch.finfo(bank.dtype).tiny  # a row of zeros has no direction
    largest = bank.abs().amax(dim=1, keepdim=True).clamp_min(tiny)  # whose squares may underflow
    norms = (largest[:, 0] * torch.linalg.vector_norm(bank / largest, dim=1)).clamp_min(tiny).double()
    return bank.div(norms.to(bank.dtype)[:, None]).float(), norms.log()


def comparable(bank: Tensor) -> Tensor:
    """Gradients [B, D] as an index compares them, float32 [B, D + 1]."""
    return _comparable(*_polar(bank))


def _comparable(direction: Tensor, log_pi: Tensor) -> Tensor:
    """Gradients as an index compares them, float32 [N, D + 1]: whatever their lengths, nothing underflows.

    For lengths a and c, ||g - b||^2 / ac = ||u - v||^2 + 4 sinh^2(log(a / c) / 2), which to second order is the squared
    distance between (u, log a) and (v, log c).
    """
    return torch.hstack([direction, log_pi[:, None]]).float()


class NoisePrototype(Gatherer):
    """The mean features of noise, once for all scores of a fit that ask; of the training images it gathers nothing."""

    def __init__(self, options: FitOptions) -> None:
        self._known: tuple[Backbone, Tensor] | None = None

    def add(self, outputs: Outputs, labels: Tensor) -> None:
        pass

    def merge(self, other: Self) -> None:
        pass

    def progress(self) -> State:
        return {}

    def restore(self, progress: State) -> None:
        pass

    def mean(self, backbone: Backbone) -> Tensor:
        """`noise_prototype` of the network, float64 [D]."""
        if self._known is None or self._known[0] is not backbone:
            self._known = backbone, noise_prototype(backbone)
        return self._known[1]


class GroodFamily(Score):
    """What the forms of GROOD share: class prototypes and one synthetic OOD prototype, in the space they compare in.

    The OOD prototype is the mean of the penultimate features of synthetic images, by the score's `generator`, else the
    fit's: `mixup` (the default): lambda e(x) + (1 - lambda) mean of e over the runner-up class of x, at the early
    layer, run on from there; `noise`: blurred uniform noise, of each hundred the ten with the least energy;
    `prototype_mean`: the mean of the class prototypes; `images`: the images that the caller passed, the only form that
    sees OOD data.
    """

    gathers: ClassVar[tuple[type[Gatherer], ...]] = (ClassSums, EarlyMaps, NoisePrototype)
    generator: ClassVar[str | None] = None  # None takes the fit's, as it does below
    mixup_coefficient: ClassVar[float | None] = None
    prototypes: Tensor
    ood_prototype: Tensor

    @classmethod
    def refuse(cls, backbone: Backbone, options: FitOptions) -> None:
        generator = cls.generator or options.generator
        if generator not in GENERATORS:
            raise ScoreError(f"there is no generator {generator!r}; use {', '.join(GENERATORS)}")
        if generator == "images" and (options.ood_images is None or not len(options.ood_images)):
            raise ScoreError(
                "the generator `images` needs images: pass FitOptions(ood_images=...) or --ood-images PATH"
            )

    def _prototypes(self, backbone: Backbone) -> tuple[Tensor, Tensor]:
        """Class prototypes [C, D] and OOD prototype [D], float64, in the network's own feature space."""
        means = self.got(ClassSums).means()
        options = self.options
        generator = self.generator or options.generator
        if generator == "prototype_mean":
            return means, means.mean(dim=0)
        if generator == "noise":
            return means, self.got(NoisePrototype).mean(backbone)
        if generator == "images":
            assert options.ood_images is not None
            return means, _mean_features(backbone, options.ood_images)
        share = options.mixup_coefficient if self.mixup_coefficient is None else self.mixup_coefficient
        return means, self.got(EarlyMaps).mean_of_mixed(backbone, share)

    def _attach(self, backbone: Backbone) -> None:
        self._anchors = torch.vstack([self.prototypes, self.ood_prototype]).double()
        self._space = self._digest()

    def _digest(self) -> str:
        """The same for forms that compare the same features with the same prototypes."""
        space = [getattr(self, name) for name in ("prototypes", "ood_prototype", "whitening") if name in self.tensors]
        digest = hashlib.sha256()
        for part in space:
            digest.update(part.contiguous().cpu().numpy())
        return digest.hexdigest()

    def _placed(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Features in the space of the prototypes, [N, D], and distances to the prototypes and the last, [N, C + 1]."""

        def place() -> tuple[Tensor, Tensor]:
            h = self._compared(outputs.features)
            return h, exact_distances(h, self._anchors)

        return outputs.once(self._space, place)

    def _compared(self, features: Tensor) -> Tensor:
        return features


class Whitened(GroodFamily):
    """A form of GROOD in the features whitened by their covariance within classes: h A, A A^T = S^-1.

    S = (1 - s) S_within + s trace(S_within) / D I. Both constants are the likeliest for the tune split: the shrinkage s
    for its features under Gaussians around the class prototypes, then the temperature T, which divides all distances
    and so A, for its labels under the softmax of -||h - p_k|| / T. Without a tune split they are 0.1 and 0.5.
    """

    gathers: ClassVar[tuple[type[Gatherer], ...]] = (*GroodFamily.gathers, Scatter)
    whitening: Tensor

    def tune(self, outputs: Outputs, labels: Tensor) -> Self:
        labels = torch.where(labels < 0, outputs.logits.argmax(dim=1).cpu(), labels)
        features = outputs.penultimate.double().cpu()
        share = self._likeliest_shrinkage(features, labels)
        temperature = self._likeliest_temperature(features, labels, share)
        return self._take(self._state(share, temperature), self._backbone)

    def _likeliest_shrinkage(self, features: Tensor, labels: Tensor) -> float:
        projected = ((features - self._raw_prototypes[labels]) @ self._axes).square().mean(dim=0)

        def loss(share: float) -> float:
            variances = self._spread(share)
            return float((projected / variances + variances.log()).sum())

        return min(SHRINKAGES, key=loss)

    def _likeliest_temperature(self, features: Tensor, labels: Tensor, share: float) -> float:
        transform = self._axes / self._spread(share).sqrt()
        distances = exact_distances(features @ transform, self._raw_prototypes @ transform)

        def loss(temperature: float) -> float:
            return float(torch.nn.functional.cross_entropy(-distances / temperature, labels))

        return min(TEMPERATURES, key=loss)

    def _fit(self, backbone: Backbone) -> State:
        within = self.got(Scatter).within_classes(self.got(ClassSums))
        self._variances, self._axes = torch.linalg.eigh(within)
        self._raw_prototypes, self._raw_ood_prototype = self._prototypes(backbone)
        self._backbone = backbone
        return self._state(DEFAULT_SHRINKAGE, DEFAULT_TEMPERATURE)

    def _spread(self, share: float) -> Tensor:
        mean = self._variances.mean().clamp_min(torch.finfo(torch.float32).tiny)
        spread: Tensor = (1 - share) * self._variances.clamp_min(0) + share * mean
        return spread

    def _state(self, share: float, temperature: float) -> State:
        transform = (self._axes / self._spread(share).sqrt() / temperature).float()
        return {
            "prototypes": (self._raw_prototypes @ transform.double()).float(),
            "ood_prototype": (self._raw_ood_prototype @ transform.double()).float(),
            "whitening": transform,
        }

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._transform = self.whitening.double()

    def _compared(self, features: Tensor) -> Tensor:
        return features @ self._transform


@register
class Grood(GroodFamily):
    """Distance from an image's gradient to the nearest training gradient: exact, unless the fit asked for an index.

    State: prototypes float32 [C, D], ood_prototype float32 [D], bank [B, D]: the training gradients, float32, or
    float64 where one is too short for float32 to hold its direction; with an index, centres float32 [L, D + 1].
    """

    name: ClassVar[str] = "grood"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (*GroodFamily.gathers, CorrectFeatures)
    tensors: ClassVar[tuple[str, ...]] = ("prototypes", "ood_prototype", "bank")
    optional: ClassVar[tuple[str, ...]] = ("centres",)
    bank: Tensor
    centres: Tensor | None

    def _fit(self, backbone: Backbone) -> State:
        prototypes, ood_prototype = (part.float() for part in self._prototypes(backbone))
        bank = gradient_bank(self.got(CorrectFeatures).features(), prototypes, ood_prototype)
        state = {"prototypes": prototypes, "ood_prototype": ood_prototype, "bank": bank}
        return state | index.kept(comparable(bank), self.options)

    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        self._bank_directions, self._bank_log_pi = _polar(self.bank)
        self._shortest, self._longest = self._bank_log_pi.aminmax()
        lengths = (self._bank_log_pi - self._longest).exp()[:, None]
        self._bank_lengths = lengths.float() if float(lengths.min()) > SAFE_NORM else lengths
        self._index = index.built(_comparable(self._bank_directions, self._bank_log_pi), self.centres)

    def _score(self, outputs: Outputs) -> Tensor:
        h, distances = self._placed(outputs)
        exact = self._nearest if self.bank.device.type == "cpu" else self._nearest_unawaited
        search = exact if self._index is None else partial(self._found, self._index)
        return in_parts(search, CHUNK_CELLS // len(self.bank), *_gradient(h, self._anchors[-1], distances))

    def _found(self, index: NearestIndex, direction: Tensor, log_pi: Tensor) -> Tensor:
        rows = index.nearest(_comparable(direction, log_pi), min(CANDIDATES, len(self.bank)))
        return self._nearest_of(rows, direction, log_pi)

    def _nearest_unawaited(self, direction: Tensor, log_pi: Tensor) -> Tensor:
        # How many rows float32 cannot tell apart is known to the device alone, and to ask would be to wait for it: so
        # all is float64 here, and of what that leaves in doubt the first few are enough.
        unit = torch.maximum(log_pi, self._shortest)
        own = (log_pi - unit).exp()[:, None] * direction
        theirs = (self._bank_log_pi[:, None] - unit).clamp_max_(log(LONGEST)).exp_()
        directions = self.bank.double() / self._bank_log_pi.exp()[:, None]
        keys = (directions @ (-2 * own).T).add_(theirs).mul_(theirs)
        rows = keys.topk(min(CANDIDATES, len(keys)), dim=0, largest=False).indices.T
        return self._nearest_of(rows, direction, log_pi)

    def _nearest_of(self, rows: Tensor, direction: Tensor, log_pi: Tensor) -> Tensor:
        unit = torch.maximum(log_pi, self._shortest)
        own = (log_pi - unit).exp()[:, None] * direction
        each = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        return self._distance(own[each], unit[each], rows.flatten()).view(rows.shape).amin(dim=1) * unit.exp()

    def _nearest(self, direction: Tensor, log_pi: Tensor) -> Tensor:
        # The nearest is no farther than ||g|| + the shortest gradient of the bank; in units of the longer of the two,
        # nothing that matters overflows or vanishes in float32, and ||g - b||^2 = own^2 + theirs^2 - 2 own theirs cos.
        unit = torch.maximum(log_pi, self._shortest)
        own = (log_pi - unit).exp()[:, None] * direction
        theirs = (self._bank_lengths * (self._longest - unit).exp().to(self._bank_lengths)).float().clamp_max_(LONGEST)
        key = products(self._bank_directions, (-2 * own).float()).add_(theirs).mul_(theirs)
        # Whatever float32 cannot tell from the nearest is measured in float64.
        row, query = close(key, 2 * ROUNDING)
        found = in_parts(
            lambda row, query: self._distance(own[query], unit[query], row), CHUNK_CELLS // own.shape[1], row, query
        )
        return torch.full_like(log_pi, torch.inf).scatter_reduce_(0, query, found, "amin") * unit.exp()

    def _distance(self, own: Tensor, unit: Tensor, row: Tensor) -> Tensor:
        """Distances, float64 [P], of gradients [P, D] to a row int64 [P] of the bank each, in units of exp(unit)."""
        log_pi = self._bank_log_pi[row]
        length = (log_pi - unit).clamp_max_(300).exp_()
        theirs = self.bank[row].double().div_(log_pi.exp_()[:, None]).mul_(length[:, None])
        distance: Tensor = torch.linalg.vector_norm(own - theirs, dim=1)
        return distance


@register
class GroodW(Whitened, Grood):
    """`grood` in whitened features: ours.

    State: that of `grood` in the whitened space, whitening float32 [D, D].
    """

    name: ClassVar[str] = "grood_w"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (*Whitened.gathers, CorrectFeatures)
    tensors: ClassVar[tuple[str, ...]] = ("prototypes", "ood_prototype", "whitening", "bank")
    mixup_coefficient: ClassVar[float | None] = OUR_MIXUP

    def _state(self, share: float, temperature: float) -> State:
        state = super()._state(share, temperature)
        features = self.got(CorrectFeatures).features().double() @ state["whitening"].double()
        bank = gradient_bank(features, state["prototypes"], state["ood_prototype"])
        return state | {"bank": bank} | index.kept(comparable(bank), self.options)


@register
class GroodNorm(GroodFamily):
    """The index-free form: ||g||_1 = pi_q ||h - q||_1 / ||h - q||_2.

    State: prototypes float32 [C, D], ood_prototype float32 [D].
    """

    name: ClassVar[str] = "grood_norm"
    tensors: ClassVar[tuple[str, ...]] = ("prototypes", "ood_prototype")

    def _fit(self, backbone: Backbone) -> State:
        prototypes, ood_prototype = self._prototypes(backbone)
        return {"prototypes": prototypes.float(), "ood_prototype": ood_prototype.float()}

    def _score(self, outputs: Outputs) -> Tensor:
        h, distances = self._placed(outputs)
        direction, log_pi = _gradient(h, self._anchors[-1], distances)
        return log_pi.exp() * direction.abs().sum(dim=1)


@register
class GroodMargin(GroodNorm):
    """min_k ||h - p_k|| - ||h - q||: ours, the limit of T logit(pi_q) for a temperature T towards zero.

    State: that of `grood_norm`.
    """

    name: ClassVar[str] = "grood_margin"
    mixup_coefficient: ClassVar[float | None] = OUR_MIXUP

    def _score(self, outputs: Outputs) -> Tensor:
        _, distances = self._placed(outputs)
        return distances[:, :-1].amin(dim=1) - distances[:, -1]


@register
class GroodMarginW(Whitened, GroodMargin):
    """`grood_margin` in whitened features: ours.

    State: that of `grood_norm` in the whitened space, whitening float32 [D, D].
    """

    name: ClassVar[str] = "grood_margin_w"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = Whitened.gathers
    tensors: ClassVar[tuple[str, ...]] = ("prototypes", "ood_prototype", "whitening")


@register
class GroodNoise(Grood):
    """`grood` with the OOD prototype of noise, whatever generator the fit has: ours.

    State: that of `grood`.
    """

    name: ClassVar[str] = "grood_noise"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (ClassSums, NoisePrototype, CorrectFeatures)
    generator: ClassVar[str | None] = "noise"


@register
class GroodMarginNoise(GroodMargin):
    """`grood_margin` with the OOD prototype of noise, whatever generator the fit has: ours.

    State: that of `grood_norm`.
    """

    name: ClassVar[str] = "grood_margin_noise"
    gathers: ClassVar[tuple[type[Gatherer], ...]] = (ClassSums, NoisePrototype)
    generator: ClassVar[str | None] = "noise"


def noise_prototype(backbone: Backbone, images: int = 100) -> Tensor:
    """Mean features, float64 [D], of blurred uniform noise: of each hundred images the ten with the least energy."""
    generator = torch.Generator().manual_seed(0)
    height, width, channels = backbone.input_shape
    kept: list[Tensor] = []
    while sum(map(len, kept)) < images:
        noise = torch.rand(100, channels, height, width, generator=generator)
        sigma = 0.2 + 4.8 * float(torch.rand((), generator=generator))
        pixels = _blurred(noise, sigma).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
        outputs = backbone.outputs(pixels.contiguous())
        least = torch.logsumexp(outputs.logits.double(), dim=1).topk(10, largest=False).indices
        kept.append(outputs.penultimate[least].double().cpu())
    return torch.cat(kept).mean(dim=0)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur 5 wide and 7 high, as the authors' code applies; images float [N, C, H, W]."""
    channels = images.shape[1]
    for length, shape in ((5, (1, 5)), (7, (7, 1))):
        offsets = torch.arange(length) - length // 2
        kernel = torch.softmax(-0.5 * (offsets / sigma).square(), dim=0).reshape(1, 1, *shape)
        padding = (shape[1] // 2,) * 2 + (shape[0] // 2,) * 2
        padded = torch.nn.functional.pad(images, padding, mode="reflect")
        images = torch.nn.functional.conv2d(padded, kernel.expand(channels, 1, *shape), groups=channels)
    return images


def _mean_features(backbone: Backbone, images: Tensor) -> Tensor:
    parts = [backbone.outputs(part).penultimate.double().cpu() for part in torch.split(images, 64)]
    return torch.cat(parts).mean(dim=0)
