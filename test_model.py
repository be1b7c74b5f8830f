"""Measure a trained network on the MNIST test set, or on your own images: `python test_model.py`."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import utils
from model import Net, count_parameters, window
from utils import Split, UserError


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Test accuracy of a checkpoint, or the digits it reads in your images."
    )
    utils.add_common_flags(parser)
    utils.add_checkpoint_flag(parser)
    add = parser.add_argument
    add("--json", metavar="PATH", help="also write the results as JSON; - writes them, and nothing else, to stdout")
    add("--tta", action="store_true", help="also report test-time augmentation: logits averaged over shifts and turns")
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="read these images, or folders of images, one handwritten digit each, not the test set")  # fmt: skip
    add("--export", type=Path, metavar="FILE", help="write the network as ONNX to FILE instead")
    args = parser.parse_args()
    if args.export and (args.images or args.tta or args.json):
        parser.error("--export goes with none of --images, --tta, --json")
    if args.images and args.tta:
        parser.error("--tta is for the test set, not for --images")
    return args


def by_digit(confusion: Tensor) -> list[dict[str, Any]]:
    """Count, errors, precision and recall of each digit; None where nothing was there to divide by."""
    right, count, claimed = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    return [
        {
            "digit": digit, "count": count[digit], "errors": count[digit] - right[digit],
            "precision": right[digit] / claimed[digit] if claimed[digit] else None,
            "recall": right[digit] / count[digit] if count[digit] else None,
        }
        for digit in range(10)
    ]  # fmt: skip


def measure(model: Net, test: Split, tta: bool) -> dict[str, Any]:
    """Everything that is reported of `model` on `test`, ready for JSON."""
    logits = utils.predict(model, test)
    confusion = utils.confusion_matrix(logits.argmax(1), test.labels)
    results = {
        "test_accuracy": utils.accuracy(logits, test.labels),
        "count": len(test.labels),
        "errors": int(confusion.sum() - confusion.trace()),
        "test_loss": F.cross_entropy(logits, test.labels).item(),
        "parameters": count_parameters(model),
        "digits": by_digit(confusion),
        "confusion_matrix": confusion.tolist(),
    }
    if tta:
        results["tta_accuracy"] = utils.accuracy(predict_tta(model, test), test.labels)
    return results


def predict_tta(model: Net, split: Split, shift: float = 1.0, angle: float = 5.0) -> Tensor:
    """Mean logits (N, 10) of 15 views: in place or `shift` pixels off in four directions, upright or `angle` turned."""
    shifts = [(0.0, 0.0), (shift, 0.0), (-shift, 0.0), (0.0, shift), (0.0, -shift)]
    views = [(turn, *offset) for turn in (0.0, angle, -angle) for offset in shifts]
    turns, offsets = torch.tensor(views).split([1, 2], dim=1)
    matrices = utils.affine_matrices(turns[:, 0], offsets, torch.ones(len(views)), torch.zeros(len(views), 2))
    images = split.images.float()
    logits = torch.zeros(len(images), 10, device=images.device)
    for matrix in matrices.to(images.device):
        moved = utils.warp(images, matrix.expand(len(images), -1, -1)).round().byte()
        logits += utils.predict(model, Split(moved, split.labels))
    return logits / len(views)


def print_report(path: Path, results: dict[str, Any]) -> None:
    """The results as a person reads them."""
    print(f"Checkpoint:     {path}")
    print(f"Parameters:     {results['parameters']:,}")
    print(f"Test accuracy:  {results['test_accuracy']:.2f}%  ({results['errors']} errors in {results['count']:,})")
    print(f"Test loss:      {results['test_loss']:.4f}")
    if "tta_accuracy" in results:
        print(f"With test-time augmentation: {results['tta_accuracy']:.2f}%")

    print("\nDigit  Count  Errors  Precision  Recall")
    for row in results["digits"]:
        precision, recall = (f"{100 * row[k]:.2f}%" if row[k] is not None else "-" for k in ("precision", "recall"))
        print(f"{row['digit']:5d}  {row['count']:5d}  {row['errors']:6d}  {precision:>9}  {recall:>7}")

    print("\nConfusion matrix (row: true digit, column: prediction, . for none)")
    print("   " + "".join(f"{digit:6d}" for digit in range(10)))
    for digit, row in enumerate(results["confusion_matrix"]):
        print(f"{digit:3d}" + "".join(f"{count or '.':>6}" for count in row))


def read_images(model: Net, paths: list[Path], quiet: bool) -> tuple[dict[str, Any], int]:
    """Classify images one by one, printing a line each unless `quiet`; returns the results and the exit status."""
    results, status = [], 0
    for path in utils.find_images(paths):
        try:
            _, image = utils.read_digit(path)
        except UserError as error:
            utils.warn(str(error))
            status = 1
            continue
        probabilities = utils.classify(model, image.unsqueeze(0))[0]
        digit = int(probabilities.argmax())
        entry = {"path": str(path), "digit": digit, "confidence": probabilities[digit].item(),
                 "probabilities": probabilities.tolist()}  # fmt: skip
        folder = path.absolute().parent.name
        if folder in set("0123456789"):
            entry["label"] = int(folder)
        results.append(entry)
        if not quiet:
            print(f"{path}\t{digit}\t{entry['confidence']:.4f}", flush=True)
    report: dict[str, Any] = {"images": results}
    labelled = [entry["digit"] == entry["label"] for entry in results if "label" in entry]
    if labelled:
        report["accuracy"] = 100 * sum(labelled) / len(labelled)
        if not quiet:
            print(f"Accuracy: {report['accuracy']:.2f}% ({sum(labelled)} of {len(labelled)})")
    return report, status


def export_onnx(model: Net, path: Path) -> str:
    """Write `model` as ONNX (opset 18, input "image", output "logits", batch size free); says what was checked.

    Raises UserError where a package is missing or the file does not compute the same logits.
    """
    try:
        import onnx  # noqa: F401  # torch.onnx imports it late and complains at length
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--export needs the package {error.name}: pip install onnx onnxscript") from error
    image = utils.normalize(torch.rand(3, 1, 28, 28))
    model = model.to("cpu")
    kernel, stride = window(model.pool, 7, 3)  # ONNX has no adaptive pooling
    pool = nn.MaxPool2d if isinstance(model.pool, nn.AdaptiveMaxPool2d) else nn.AvgPool2d
    exported = copy.deepcopy(model)
    exported.pool = pool(kernel, stride)
    try:
        with utils.replacing(path) as temporary:
            torch.onnx.export(
                exported, (image,), str(temporary), opset_version=18, input_names=["image"], output_names=["logits"],
                dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
            return check_onnx(temporary, model, image)
    except (TypeError, RuntimeError) as error:  # before 2.5 torch did not know these arguments
        raise UserError(f"torch {torch.__version__} cannot export it ({str(error).splitlines()[0]})") from error


def check_onnx(path: Path, model: Net, images: Tensor) -> str:
    """Compare the file at `path` with `model` on `images` (N, 1, 28, 28); UserError if their logits differ."""
    try:
        import onnxruntime
    except ImportError:
        return "not checked: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = 0.0
    for x in (images, images[:1]):
        (logits,) = session.run(["logits"], {"image": x.numpy()})
        difference = max(difference, (torch.from_numpy(logits) - model(x).detach()).abs().max().item())
    if difference > 1e-4:
        raise UserError(f"not exported: in ONNX the logits differ by {difference:.1e} from PyTorch's")
    return f"checked with onnxruntime: logits differ by at most {difference:.1e}"


def main() -> int:
    args = parse_args()
    device = utils.choose_device(args.device)
    model, _ = utils.load_model(args.checkpoint, device)
    if args.export:
        print(f"Wrote {args.export}: {export_onnx(model, args.export)}")
        return 0
    status, to_stdout = 0, args.json == "-"
    if args.images:
        results, status = read_images(model, args.images, quiet=to_stdout)
    else:
        results = measure(model, utils.load_mnist(args.data_dir, train=False, device=device), args.tta)
        if not to_stdout:
            print_report(args.checkpoint, results)
    if to_stdout:
        json.dump(results, sys.stdout, indent=2)
        print()
    elif args.json:
        utils.write_json(Path(args.json), results)
    return status


if __name__ == "__main__":
    utils.run_script(main)
