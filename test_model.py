"""Measure a trained network on the test set, or on your own images: `python test_model.py`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from model import CLASS_NAMES, Net, count_parameters
from utils import SPLITS, SURE, Split, UserError


def evaluate(model: Net, split: Split, tta: bool = False) -> dict[str, Any]:
    """All that is reported of `model` on `split`, ready for JSON; shares are from 0 to 1.

    `tta` as in `utils.predict`.
    """
    logits = utils.predict(model, split.images, tta)
    confidence, predictions = logits.softmax(1).max(1)
    is_sure = confidence > SURE
    wrong = predictions != split.labels
    confusion = utils.confusion_matrix(predictions, split.labels)
    return {
        **utils.measure(logits, split.labels),
        "sure": is_sure.float().mean().item(),
        "sure_count": int(is_sure.sum()),
        "sure_errors": int((is_sure & wrong).sum()),
        "count": len(split),
        "errors": int(wrong.sum()),
        "parameters": count_parameters(model),
        "tta": tta,
        "classes": by_class(confusion),
        "confusion_matrix": confusion.tolist(),
    }


def by_class(confusion: Tensor) -> list[dict[str, Any]]:
    """Name, count, errors, precision and recall of each class from counts (10, 10).

    Precision and recall are None where they would be 0 / 0.
    """
    rows = []
    for i, name in enumerate(CLASS_NAMES):
        right = int(confusion[i, i])
        count = int(confusion[i].sum())
        predicted = int(confusion[:, i].sum())
        rows.append(
            {
                "class": name,
                "count": count,
                "errors": count - right,
                "precision": right / predicted if predicted else None,
                "recall": right / count if count else None,
            }
        )
    return rows


def print_report(results: dict[str, Any]) -> None:
    """Print what `evaluate` returned, as tables for people."""
    part = SPLITS[results["split"]].capitalize()
    errors = f"({results['errors']} errors in {results['count']:,})"
    sure_errors = f"({results['sure_errors']} of {results['sure_count']:,} wrong)"
    rows = {
        "Checkpoint": results["checkpoint"],
        "Parameters": f"{results['parameters']:,}",
        "Looks": f"nine at images under {SURE:.0%} sure" if results["tta"] else "one",
        f"{part} accuracy": f"{results['accuracy']:.2%}  {errors}",
        f"{part} loss": f"{results['loss']:.4f}",
        f"Over {SURE:.0%} sure": f"{results['sure']:.2%}  {sure_errors}",
    }
    width = max(map(len, rows)) + 3
    for title, value in rows.items():
        print(f"{title}:".ljust(width) + value)

    name_width = max(len("Class"), *map(len, CLASS_NAMES))
    print(f"\n{'Class':>{name_width}}  Count  Errors  Precision   Recall")
    for row in results["classes"]:
        shares = ["-" if row[k] is None else f"{row[k]:.2%}" for k in ("precision", "recall")]
        print(f"{row['class']:>{name_width}}  {row['count']:5d}  {row['errors']:6d}  "
              f"{shares[0]:>9}  {shares[1]:>7}")

    print("\nConfusion matrix (row: true class, column: prediction, . for none)")
    cell = max(6, 1 + name_width)
    print(" " * name_width + "".join(f"{name:>{cell}}" for name in CLASS_NAMES))
    for name, row in zip(CLASS_NAMES, results["confusion_matrix"]):
        print(f"{name:>{name_width}}" + "".join(f"{count or '.':>{cell}}" for count in row))


def print_images(results: dict[str, Any]) -> None:
    """Print what `photos.read_images` returned; a doubt is a warning that digits are missing."""
    for image in results["images"]:
        guess = f"\tor perhaps {image['second_guess']}" if "second_guess" in image else ""
        doubt = f"\t{image['doubt']}" if "doubt" in image else ""
        print(f"{image['path']}\t{image['number']}\t{image['confidence']:.4f}{guess}{doubt}")
    if "accuracy" in results:
        share = f"{results['right']} of {results['labelled']}"
        print(f"Accuracy: {results['accuracy']:.2%} ({share})")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError for flags that do not go together."""
    parser = utils.Parser("Accuracy of a checkpoint, or the digits that it reads in your images.")
    utils.add_common_flags(parser)
    utils.add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--json", metavar="PATH",
        help="also write the results as JSON, all shares from 0 to 1; -: print nothing else")
    add("--labels", action="store_true",
        help="take the name of an image's folder, such as 472, as its label; print the accuracy")
    add("--export", type=Path, metavar="FILE",
        help="only write the network to FILE: as ONNX (.onnx), or as a page to draw on (.html)")
    args = parser.parse_args(argv)
    utils.refuse_unused(parser, args, "images", ["split", "data_dir", "tta"])
    utils.refuse_unused(parser, args, "export", ["split", "data_dir", "tta", "images", "json"])
    if (args.labels or args.raw) and not args.images:
        raise UserError(f"--{'labels' if args.labels else 'raw'} goes with --images")
    if args.export and args.export.suffix not in (".onnx", ".html"):
        raise UserError(f"--export {args.export}: the name must end in .onnx or .html")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    device = torch.device("cpu") if args.export else utils.choose_device(args.device)
    model, checkpoint = utils.load_model(args.checkpoint, device)
    failed = 0
    if args.export:
        from extras import export

        if args.export.suffix == ".onnx":
            export.export_onnx(model, args.export)
        else:
            export.export_page(model, args.export, checkpoint)
        print(f"Wrote {args.export}")
        return 0
    if args.images:
        from extras import photos

        results, failed = photos.read_images(model, args.images, args.labels, args.raw)
    else:
        split = utils.load_split(args.split, args.data_dir, checkpoint, device)
        where = {"checkpoint": str(checkpoint["path"]), "split": args.split}
        results = {**where, **evaluate(model, split, args.tta)}
    if args.json and args.json != "-":
        utils.write_json(Path(args.json), results)
    if args.json == "-":
        print(json.dumps(results, indent=2))
    elif args.images:
        print_images(results)
    else:
        print_report(results)
    return int(failed > 0)


if __name__ == "__main__":
    utils.run_script(main)
