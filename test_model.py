"""Measure a trained network on the MNIST test set, or on your own images: `python test_model.py`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from model import CLASSES, Net, count_parameters
from utils import SPLITS, SURE, Split, UserError


def evaluate(model: Net, split: Split, tta: bool = False) -> dict[str, Any]:
    """Everything that is reported of `model` on `split`, ready for JSON; shares are from 0 to 1.

    `tta` as in `utils.predict`.
    """
    logits = utils.predict(model, split.images, tta)
    confidence, predictions = logits.softmax(1).max(1)
    sure, wrong = confidence > SURE, predictions != split.labels
    confusion = utils.confusion_matrix(predictions, split.labels)
    return {
        **utils.measure(logits, split.labels),
        "sure": sure.float().mean().item(),
        "sure_count": int(sure.sum()),
        "sure_errors": int((sure & wrong).sum()),
        "count": len(wrong),
        "errors": int(wrong.sum()),
        "parameters": count_parameters(model),
        "tta": tta,
        "digits": by_digit(confusion),
        "confusion_matrix": confusion.tolist(),
    }


def by_digit(confusion: Tensor) -> list[dict[str, Any]]:
    """Count, errors, precision and recall of each digit from counts (10, 10); None where it would be 0 / 0."""
    right, count, claimed = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    return [
        {
            "digit": digit,
            "count": count[digit],
            "errors": count[digit] - right[digit],
            "precision": right[digit] / claimed[digit] if claimed[digit] else None,
            "recall": right[digit] / count[digit] if count[digit] else None,
        }
        for digit in range(CLASSES)
    ]


def print_report(path: Path, results: dict[str, Any]) -> None:
    """Print what `evaluate` returned for the checkpoint at `path`, as a table for people."""
    name, wrong = SPLITS[results["split"]].capitalize(), results["sure_errors"]
    rows = {
        "Checkpoint": path,
        "Parameters": f"{results['parameters']:,}",
        "Looks": f"nine at digits under {SURE:.0%} sure" if results["tta"] else "one",
        f"{name} accuracy": f"{results['accuracy']:.2%}  ({results['errors']} errors in {results['count']:,})",
        f"{name} loss": f"{results['loss']:.4f}",
        f"Over {SURE:.0%} sure": f"{results['sure']:.2%}  ({wrong} of {results['sure_count']:,} wrong)",
    }
    width = max(map(len, rows)) + 1
    for row, value in rows.items():
        print(f"{row + ':':{width}}  {value}")

    print("\nDigit  Count  Errors  Precision  Recall")
    for row in results["digits"]:
        precision, recall = (f"{row[k]:.2%}" if row[k] is not None else "-" for k in ("precision", "recall"))
        print(f"{row['digit']:5d}  {row['count']:5d}  {row['errors']:6d}  {precision:>9}  {recall:>7}")

    print("\nConfusion matrix (row: true digit, column: prediction, . for none)")
    print("   " + "".join(f"{digit:6d}" for digit in range(CLASSES)))
    for digit, row in enumerate(results["confusion_matrix"]):
        print(f"{digit:3d}" + "".join(f"{count or '.':>6}" for count in row))


def read_images(model: Net, paths: Sequence[Path], labels: bool = False) -> tuple[dict[str, Any], int]:
    """Everything that is reported of the images in `paths`, ready for JSON, and how many could not be read.

    With `labels` the name of an image's folder is the right answer, and the accuracy, from 0 to 1, is reported too.
    """
    from extras import photos

    files = photos.find_images(paths)
    images = [report for _, _, report in photos.read_files(model, files)]
    results: dict[str, Any] = {"images": images}
    if labels and images:
        for image in images:
            image["label"] = Path(image["path"]).absolute().parent.name
        right = sum(image["number"] == image["label"] for image in images)
        results.update(accuracy=right / len(images), right=right, labelled=len(images))
    return results, len(files) - len(images)


def print_images(results: dict[str, Any]) -> None:
    """Print what `read_images` returned: a line for each image, and the accuracy if they have labels."""
    for image in results["images"]:
        doubt = f"\tor perhaps {image['second_guess']}" if "second_guess" in image else ""
        print(f"{image['path']}\t{image['number']}\t{image['confidence']:.4f}{doubt}")
    if "accuracy" in results:
        print(f"Accuracy: {results['accuracy']:.2%} ({results['right']} of {results['labelled']})")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError for flags that do not go together."""
    parser = argparse.ArgumentParser(
        description="Test accuracy of a checkpoint, or the digits that it reads in your images."
    )
    utils.add_common_flags(parser)
    utils.add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--json", metavar="PATH",
        help="also write the results as JSON, all shares from 0 to 1; - writes only that, to stdout")  # fmt: skip
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="instead of a split read these images, or folders of images, of a digit or a number each")  # fmt: skip
    add("--labels", action="store_true",
        help="the name of each image's folder is the right answer, such as 472: report the accuracy")  # fmt: skip
    add("--export", type=Path, metavar="FILE",
        help="only write the network to FILE: as ONNX (.onnx), or as a page to draw digits on (.html)")  # fmt: skip
    args = parser.parse_args(argv)
    utils.refuse_unused(parser, args, "images", ("split", "data_dir", "tta"))
    utils.refuse_unused(parser, args, "export", ("split", "data_dir", "tta", "images", "json"))
    if args.labels and not args.images:
        raise UserError("--labels goes with --images")
    if args.export and args.export.suffix not in (".onnx", ".html"):
        raise UserError(f"--export {args.export}: the name must end in .onnx or .html")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    device = torch.device("cpu") if args.export else utils.choose_device(args.device)
    model, checkpoint = utils.load_model(args.checkpoint, device)
    unread = 0
    if args.export:
        from extras import export

        to_onnx = args.export.suffix == ".onnx"
        done = export.export_onnx(model, args.export) if to_onnx else export.export_page(model, args.export, checkpoint)
        print(f"Wrote {args.export}: {done}")
        return 0
    if args.images:
        results, unread = read_images(model, args.images, args.labels)
    else:
        split = utils.load_split(args.split, args.data_dir, checkpoint, device)
        results = {"split": args.split, **evaluate(model, split, args.tta)}
    if args.json == "-":
        print(json.dumps(results, indent=2))
    elif args.images:
        print_images(results)
    else:
        print_report(utils.find_runs(args.checkpoint)[0], results)
    if args.json not in (None, "-"):
        utils.write_json(Path(args.json), results)
    return int(unread > 0)


if __name__ == "__main__":
    utils.run_script(main)
