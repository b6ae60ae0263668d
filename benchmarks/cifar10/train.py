# SPDX-License-Identifier: Apache-2.0
"""Train the network of the embedded default model on the fit part of CIFAR-10.

    python -m benchmarks.cifar10.train --out build/cifar10            # 48 base channels: 75 minutes on 2 cores
    python -m benchmarks.cifar10.train --out build/wide --width 64 --held-out 2000 --epochs 36 --batch-size 192 \\
        --lr 0.25 --small-epochs 22 --whole-epochs 8                  # the published width: 2 hours on 2 cores

SGD with Nesterov momentum on a one-cycle schedule, bfloat16, channels-last, flips, four-pixel shifts and one erased
square of eight pixels, no label smoothing. The first epochs may run on images of 24 pixels, and the last without the
erased square.
Writes weights.safetensors and training.json; starts again where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from benchmarks.cifar10.splits import HELD_OUT, split
from benchmarks.datasets import Images, load
from detector.cifar_resnet import CifarResNet18

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SHIFT = 4  # pixels; the padding of the OpenOOD recipe
ERASED = 8  # pixels; the side of the square that is set to the mean
SMALL = 24  # pixels; the side of the images of the first epochs, where asked for


def normalised(images: Tensor) -> Tensor:
    mean = torch.tensor(MEAN, device=images.device).mul(255)
    std = torch.tensor(STD, device=images.device).mul(255)
    return images.float().sub(mean).div(std).permute(0, 3, 1, 2)  # NHWC bytes -> channels-last NCHW


def augmented(padded: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    side = padded.shape[1] - 2 * SHIFT
    n = len(chosen)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, n, 1), generator=generator)
    columns = left + torch.arange(side)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    rows = top + torch.arange(side)
    return padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def erased(x: Tensor, generator: torch.Generator) -> Tensor:
    n, _, height, width = x.shape
    top = torch.randint(0, height - ERASED + 1, (n, 1), generator=generator)
    left = torch.randint(0, width - ERASED + 1, (n, 1), generator=generator)
    rows, columns = torch.arange(height) - top, torch.arange(width) - left
    inside_rows, inside_columns = (rows >= 0) & (rows < ERASED), (columns >= 0) & (columns < ERASED)
    square = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return x.masked_fill(square.to(x.device), 0.0)


def accuracy(network: torch.nn.Module, images: Images, labels: np.ndarray, device: torch.device) -> float:
    network.eval()
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(images), 500):
            logits = network(normalised(torch.from_numpy(images[start : start + 500]).to(device)))
            hits += int((logits.argmax(1).cpu() == torch.from_numpy(labels[start : start + 500])).sum())
    return hits / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="images of tune and of calibration, each")
    parser.add_argument("--small-epochs", type=int, default=0, help="first epochs, on images of 24 pixels")
    parser.add_argument("--whole-epochs", type=int, default=0, help="last epochs, without the erased square")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(args)


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    images, labels = split(args.held_out)["fit"]
    test_images, test_labels = load("cifar10-test")
    padded = torch.from_numpy(np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect"))
    targets = torch.from_numpy(labels)

    network = CifarResNet18(10, args.width).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing from torch's stubs
    optimiser = torch.optim.SGD(
        network.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    steps_per_epoch = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, args.lr, args.epochs * steps_per_epoch, pct_start=0.2, cycle_momentum=False, final_div_factor=1e4
    )
    history: list[dict[str, float]] = []
    checkpoint = args.out / "checkpoint.pt"
    recipe = {key: value for key, value in vars(args).items() if key != "out"}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        if saved["recipe"] != recipe:
            raise SystemExit(f"{checkpoint} is of another recipe; remove it, or train into another folder")
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        history = saved["history"]

    for epoch in range(len(history), args.epochs):
        started = time.monotonic()
        generator = torch.Generator().manual_seed(args.seed * 10_000 + epoch)  # an epoch is the same after a restart
        order = torch.randperm(len(images), generator=generator)
        network.train()
        total = 0.0
        for step in range(steps_per_epoch):
            chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
            x = normalised(augmented(padded, chosen, generator).to(device))
            if epoch < args.epochs - args.whole_epochs:
                x = erased(x, generator)
            if epoch < args.small_epochs:
                x = functional.interpolate(x, size=(SMALL, SMALL), mode="bilinear", antialias=True)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = network(x)
            loss = functional.cross_entropy(logits.float(), targets[chosen].to(device))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        history.append({"epoch": epoch + 1, "loss": total / steps_per_epoch, "seconds": time.monotonic() - started})
        if (epoch + 1) % 5 == 0 or epoch + 1 == args.epochs:
            history[-1]["test_accuracy"] = accuracy(network, test_images, test_labels, device)
        print(json.dumps(history[-1]), flush=True)
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "history": history,
                "recipe": recipe,
            },
            partial,
        )
        partial.replace(checkpoint)

    weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, args.out / "weights.safetensors")
    summary = {
        "recipe": recipe | {"torch": torch.__version__},
        "fit_images": len(images),
        "test_images": len(test_images),
        "test_accuracy": accuracy(network, test_images, test_labels, device),
        "history": history,
    }
    (args.out / "training.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
