# SPDX-License-Identifier: Apache-2.0
"""The OpenOOD v1.5 protocol on ImageNet-1K for those who have its images; README.md beside this file says how.

python -m benchmarks.imagenet --imagenet ImageNet --near ssb_hard=SSB --near ninco=NINCO \
    --far inaturalist=INAT --far textures=DTD --far openimage_o=OI --out build/imagenet/1
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.imagenet.protocol import SCORES, Plan, run
from detector.errors import OodgateError
from detector.evaluation import table


def main(arguments: list[str] | None = None) -> None:
    """Run the protocol as the command line asks; exit with a message where it cannot."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        plan = Plan(
            imagenet=args.imagenet,
            near=_named(args.near),
            far=_named(args.far),
            lists=_named(args.list),
            out=args.out,
            backbone=args.backbone,
            weights=args.weights,
            early=args.early_layer,
            size=args.size,
            train_images=args.train_images or None,
            bank_size=args.bank_size,
            held_out=args.held_out,
            scores=tuple(args.scores.split(",")),
            device=args.device,
        )
        result = run(plan, _progress)
    except (OodgateError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    results = args.results or args.out.with_name(f"{args.out.name}-results.json")
    results.write_text(json.dumps(result, indent=1) + "\n")
    for score in result["scores"]:
        print(f"## {score}\n\n{table(result, score)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.imagenet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--imagenet", type=Path, required=True, help="holds train/ and val/, one folder for each class in both")
    add("--near", action="append", default=[], metavar="NAME=DIR", help="a near-OOD set: any folder of images")
    add("--far", action="append", default=[], metavar="NAME=DIR", help="a far-OOD set")
    add("--list", action="append", default=[], metavar="NAME=FILE", help="use only those images of a set; README.md")
    add("--out", type=Path, required=True, help="the model directory to write: build/NAME/VERSION")
    add("--results", type=Path, help="the JSON file of the results  [beside --out]")
    add("--backbone", default="torchvision:resnet50", help="as `oodgate fit` takes it")
    add("--weights", default="IMAGENET1K_V1", help="a file, or one of torchvision's own, which are downloaded")
    add("--early-layer", default="layer3", help="where the mix-up of GROOD resumes from")
    add("--size", type=int, help="side of the input in pixels, for networks that take another than 224")
    add("--train-images", type=int, default=50_000, help="fitted on, balanced over the classes; 0 takes all")
    add("--bank-size", type=int, default=10_000, help="training features and gradients kept")
    add("--held-out", type=int, default=5_000, help="validation images for tuning and calibration; the rest is tested")
    add("--scores", default=",".join(SCORES), help="names of scores, joined by commas")
    add("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    return parser


def _named(texts: list[str]) -> dict[str, Path]:
    pairs = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).exists():
            raise ValueError(f"{text!r} must be NAME=PATH, and the path must exist")
        pairs[name] = Path(path)
    return pairs


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\r{done:,} of {total:,} images", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
