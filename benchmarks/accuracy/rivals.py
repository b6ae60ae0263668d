# SPDX-License-Identifier: Apache-2.0
"""The detectors of pytorch-ood on the same inputs as our scores: someone else's code.

pip install 'oodgate[rivals]'

They take features that are already there, but for ODIN, which takes images and runs the network itself. GradNorm and
NAC run it too and are left out, for we have our own; AdaSCALE and WeiPer are not in the library (0.4.0). Each runs with
two settings, ALIGNED and the library's own DEFAULTS, so that a difference to our scores can be told apart: one
that is there only with the defaults is a choice of parameters, one that is there with both is another definition.

Definitions that differ whatever the parameters, ours second:

msp     float32 probabilities, which tie at 1 / float64, with all digits of 1 - p.
gen     probabilities clipped to [1e-7, 1 - 1e-7] / as they are. OpenOOD does not clip either.
mds     inverse in float32 of the scatter with 1e-6 on its diagonal / eigenvalues under 1e-7 of the largest left out.
rmds    as mds, twice; features with many nearly constant entries then differ by points, see mds.
react   the interpolated percentile / the nearest value. No difference that a rank would show.
knn     all training features / a class-balanced bank of 10,000, the `bank_size` of a fit.

ODIN has its published defaults, temperature 1000 and step 0.0014, tuned to no network here. Aligned, the step is one of
pixels scaled to 0-1, as in its authors' code and OpenOOD: each channel's is divided by its std. The library's is
0.0014 of the normalised input, a fifth to a fourth of that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detector.backbone import Backbone
from detector.data import Dataset, batches

Values = NDArray[np.float64]

BATCH = 64  # images of which ODIN keeps the activations
CELLS = 2**25  # DICE holds images x classes x features at a time
FORMS = {"LogitsDetector": "logits", "FeaturesDetector": "features", "FeatureMapsDetector": "feature_maps"}

# The parameters of OpenOOD, which are ours too. KNN's k depends on the bank; see `compare`.
ALIGNED: dict[str, dict[str, Any]] = {
    "gen": {"M": 100},
    "react": {"percentile": 0.90},
    "scale": {"percentile": 0.85},
    "nci": {"alpha": 1e-3},  # OpenOOD chooses it on validation OOD images; 1e-3 is within its sweep
    "ash": {"percentile": 0.90, "variant": "ash-b"},
    "nnguide": {"k": 100},
    "dice": {"p": 0.9},
}
# DICE and ViM have no default there. ViM's size is set by the rule of its paper's code in both settings.
DEFAULTS: dict[str, dict[str, Any]] = {"dice": {"p": 0.9}}
ODIN = {"temperature": 1000.0, "eps": 0.0014}


class RivalsMissing(ImportError):
    """pytorch-ood or scikit-learn is not installed."""


def installed() -> Any:
    """The module of the library's detectors; RivalsMissing where it is not installed."""
    try:
        importlib.import_module("sklearn.neighbors")  # the library itself misses it only when KNN is made
        return importlib.import_module("pytorch_ood.detector")
    except ImportError as error:
        wanted = "pytorch-ood and scikit-learn: pip install 'oodgate[rivals]'"
        raise RivalsMissing(f"the rivals need {wanted} ({error})") from error


def rival_scores(
    train: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    sets: Mapping[str, Tensor],
    *,
    parameters: Mapping[str, Mapping[str, Any]] = ALIGNED,
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, Values]]:
    """Fit the detectors on training features and score sets of features with them.

    Args:
        train: float32 [N, D], the penultimate features of training images.
        labels: int64 [N], every class at least once.
        weight, bias: float32 [C, D] and [C], the last linear layer.
        sets: float32 [M, D] by name.
        parameters: ALIGNED, DEFAULTS, or others, by score.
        names: the scores wanted; all where not given.

    Returns:
        float64 [M] by score and set, larger = more OOD. A score that we have too goes by our name.

    Raises:
        RivalsMissing: the library is not installed.
        ValueError: training features that a detector refuses, such as a class with no correct image for `she`.
    """
    head = _head(weight, bias)
    makers = _chosen(_makers(installed(), head), names)
    chunk = max(1, CELLS // weight.numel())
    result: dict[str, dict[str, Values]] = {}
    for name, maker in makers.items():
        rival = maker(**parameters.get(name, {}))
        form = _form(rival)
        view = _views(head)[form]
        if rival.requires_fit:
            getattr(rival, f"fit_{form}")(view(train), labels)
        result[name] = {key: _predict(rival, form, view, features, chunk) for key, features in sets.items()}
    return result


def odin_scores(
    backbone: Backbone, sets: Mapping[str, Dataset], parameters: Mapping[str, Any] = ODIN
) -> dict[str, Values]:
    """ODIN on images, two forward passes and a backward pass each, in float32 whatever the backbone's precision.

    Args:
        backbone: the network.
        sets: its images by name.
        parameters: of the library's ODIN: `temperature`, `eps`, `norm_std`.

    Returns:
        float64 [M] by set, larger = more OOD.

    Raises:
        RivalsMissing: the library is not installed.
    """
    odin = installed().ODIN(backbone.module, **parameters)
    result: dict[str, Values] = {}
    for name, dataset in sets.items():
        parts = [odin.predict(backbone.normalised(torch.from_numpy(batch.images))) for batch in batches(dataset, BATCH)]
        result[name] = np.asarray(torch.cat(parts).double().cpu().numpy())
    return result


def _chosen(makers: dict[str, Callable[..., Any]], names: Sequence[str] | None) -> dict[str, Callable[..., Any]]:
    unknown = sorted(set(names or ()) - set(makers))
    if unknown:
        raise ValueError(f"pytorch-ood has no {', '.join(unknown)} on features; it has {', '.join(makers)}")
    return {name: makers[name] for name in names or makers}


def _makers(library: Any, head: nn.Linear) -> dict[str, Callable[..., Any]]:
    """Each takes the parameters of its score."""
    none, flat = nn.Identity(), nn.Sequential(nn.Flatten(), head)
    weight, bias = head.weight, head.bias
    size = weight.shape[1]
    subspace = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
    return {
        "msp": lambda **options: library.MaxSoftmax(None, **options),
        "max_logit": lambda **options: library.MaxLogit(None, **options),
        "energy": lambda **options: library.EnergyBased(None, **options),
        "gen": lambda **options: library.GEN(None, **options),
        "react": lambda **options: library.ReAct(none, flat, **options),
        "scale": lambda **options: library.SCALE(none, flat, **options),
        "knn": lambda **options: library.KNN(None, **options),
        "mds": lambda **options: library.Mahalanobis(None, **options),
        "rmds": lambda **options: library.RMD(None, **options),
        "vim": lambda **options: library.ViM(None, subspace, weight, bias, **options),
        "fdbd": lambda **options: library.fDBD(none, head, **options),
        "nci": lambda **options: library.NCI(none, head, **options),
        "klm": lambda **options: library.KLMatching(None, **options),
        "ash": lambda **options: library.ASH(none, flat, **options),
        "dice": lambda **options: library.DICE(None, weight, bias, **options),
        "she": lambda **options: library.SHE(none, head, **options),
        "nnguide": lambda **options: library.NNGuide(none, head, **options),
        "vra": lambda **options: library.VRA(none, flat, **options),
        "lts": lambda **options: library.LTS(None, head, **options),
        "pnml": lambda **options: library.PNML(None, head, **options),
        "gmm": lambda **options: library.GMM(None, **options),
    }


def _head(weight: Tensor, bias: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return head


def _form(rival: object) -> str:
    return next(FORMS[base.__name__] for base in type(rival).__mro__ if base.__name__ in FORMS)


def _views(head: nn.Linear) -> dict[str, Callable[[Tensor], Tensor]]:
    """Features as the logits, as themselves, and as maps of one pixel."""
    return {"logits": head, "features": lambda rows: rows, "feature_maps": lambda rows: rows[:, :, None, None]}


def _predict(rival: Any, form: str, view: Callable[[Tensor], Tensor], features: Tensor, chunk: int) -> Values:
    predict = getattr(rival, f"predict_{form}")
    with torch.no_grad():
        values = torch.cat([predict(view(part)) for part in torch.split(features, chunk)])
    return np.asarray(values.double().numpy())
