"""Measure a trained network on the MNIST test set, or on your own images: `python test_model.py`."""

from __future__ import annotations

import argparse
import base64
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import utils
from model import Block, Net, count_parameters, window
from utils import Split, UserError

PAGE = Path(__file__).resolve().parent / "assets" / "draw.html"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Test accuracy of a checkpoint, or the digits it reads in your images."
    )
    utils.add_common_flags(parser)
    utils.add_checkpoint_flag(parser)
    add = parser.add_argument
    add("--json", metavar="PATH", help="also write the results as JSON; - writes them, and nothing else, to stdout")
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="read these images, or folders of images, one handwritten digit each, not the test set")  # fmt: skip
    add("--export", type=Path, metavar="FILE",
        help="write the network to FILE instead: as ONNX (.onnx), or as a page to draw digits on (.html)")  # fmt: skip
    args = parser.parse_args()
    if args.export and (args.images or args.json):
        parser.error("--export goes with neither --images nor --json")
    if args.export and args.export.suffix not in EXPORTS:
        raise UserError(f"--export {args.export}: the name must end in {' or '.join(EXPORTS)}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The test set


def measure(model: Net, test: Split) -> dict[str, Any]:
    """Everything that is reported of `model` on `test`, ready for JSON."""
    logits = utils.predict(model, test)
    confusion = utils.confusion_matrix(logits.argmax(1), test.labels)
    return {
        "test_accuracy": utils.accuracy(logits, test.labels),
        "count": len(test.labels),
        "errors": int(confusion.sum() - confusion.trace()),
        "test_loss": F.cross_entropy(logits, test.labels).item(),
        "parameters": count_parameters(model),
        "digits": by_digit(confusion),
        "confusion_matrix": confusion.tolist(),
    }


def by_digit(confusion: Tensor) -> list[dict[str, Any]]:
    """Count, errors, precision and recall of each digit; None where nothing was there to divide by."""
    right, count, claimed = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    return [
        {
            "digit": digit,
            "count": count[digit],
            "errors": count[digit] - right[digit],
            "precision": right[digit] / claimed[digit] if claimed[digit] else None,
            "recall": right[digit] / count[digit] if count[digit] else None,
        }
        for digit in range(10)
    ]


def print_report(path: Path, results: dict[str, Any]) -> None:
    """The results as a person reads them."""
    print(f"Checkpoint:     {path}")
    print(f"Parameters:     {results['parameters']:,}")
    print(f"Test accuracy:  {results['test_accuracy']:.2f}%  ({results['errors']} errors in {results['count']:,})")
    print(f"Test loss:      {results['test_loss']:.4f}")

    print("\nDigit  Count  Errors  Precision  Recall")
    for row in results["digits"]:
        precision, recall = (f"{100 * row[k]:.2f}%" if row[k] is not None else "-" for k in ("precision", "recall"))
        print(f"{row['digit']:5d}  {row['count']:5d}  {row['errors']:6d}  {precision:>9}  {recall:>7}")

    print("\nConfusion matrix (row: true digit, column: prediction, . for none)")
    print("   " + "".join(f"{digit:6d}" for digit in range(10)))
    for digit, row in enumerate(results["confusion_matrix"]):
        print(f"{digit:3d}" + "".join(f"{count or '.':>6}" for count in row))


# ---------------------------------------------------------------------------------------------------------------------
# Your own digits
def find_images(paths): ...
def read_digit(path): ...
def classify(model, digits): ...
def read_images(model, paths, quiet): ...


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export_onnx(model: Net, path: Path) -> str:
    """Write `model` as ONNX (opset 18, input "image", output "logits", batch size free); says what was checked.

    Raises UserError where a package is missing or the file does not compute the same logits.
    """
    try:
        import onnx  # noqa: F401  # torch.onnx imports it late and complains at length
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--export needs the package {error.name}: pip install onnx onnxscript") from error
    images = utils.normalize(torch.rand(3, 1, 28, 28))
    exported = copy.deepcopy(model)
    pool = nn.MaxPool2d if isinstance(model.pool, nn.AdaptiveMaxPool2d) else nn.AvgPool2d
    exported.pool = pool(*window(model.pool, 7, 3))  # ONNX has no adaptive pooling
    with utils.replacing(path) as temporary:
        torch.onnx.export(
            exported, (images,), str(temporary), opset_version=18, input_names=["image"], output_names=["logits"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        return check_onnx(temporary, model, images)


def check_onnx(path: Path, model: Net, images: Tensor) -> str:
    """Compare the file at `path` with `model` on `images` (N, 1, 28, 28); UserError if their logits differ."""
    try:
        import onnxruntime
    except ImportError:
        return "not checked: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.numpy()})
    difference = (torch.from_numpy(logits) - model(images).detach()).abs().max().item()
    if difference > 1e-4:
        raise UserError(f"not exported: in ONNX the logits differ by {difference:.1e} from PyTorch's")
    return f"checked with onnxruntime: logits differ by at most {difference:.1e}"


def export_page(model: Net, path: Path) -> str:
    """Write assets/draw.html with the weights of `model` to `path`; says what to do with it.

    Raises UserError where the page cannot compute what `model` computes.
    """
    page = PAGE.read_bytes().decode()
    before, old, after = re.split(r'(?<=<script id="network" type="application/json">)(.*)(?=</script>)', page)
    network = page_network(model, json.loads(old)["digit"])
    with utils.replacing(path) as temporary:
        temporary.write_bytes((before + json.dumps(network) + after).encode())
    return "open it in a browser"


def page_network(model: Net, digit: str) -> dict[str, Any]:
    """`model` as the page reads it: shapes, weights, and its logits for `digit`, 784 bytes in base64.

    Computed in float64, so that the rounded numbers do not depend on the processor. UserError as export_page.
    """
    model = copy.deepcopy(model).cpu().double().requires_grad_(False)
    image = utils.normalize(torch.tensor(list(base64.b64decode(digit))).view(1, 1, 28, 28) / 255.0).double()
    logits = model(image)
    try:
        layers = [fold_norm(block) for block in model.blocks]
        layers += [(layer.weight, layer.bias) for layer in (model.fc1, model.fc2)]
        shapes = [list(weights.shape) for weights, _ in layers]
        pools = [isinstance(block.pool, nn.MaxPool2d) for block in model.blocks]
        numbers = torch.cat([part.flatten() for layer in layers for part in layer]).float().numpy()
        network = {
            "activation": model.architecture["activation"],
            "adaptive_pool": model.architecture["adaptive_pool"],
            "blocks": [{"shape": shape, "pool": pool} for shape, pool in zip(shapes, pools)],
            "fc1": {"shape": shapes[-2]},
            "fc2": {"shape": shapes[-1]},
            "digit": digit,
            "logits": [round(logit, 3) for logit in logits[0].tolist()],
            "weights": base64.b64encode(numbers.astype("<f4").tobytes()).decode(),
        }
        difference = (forward_as_page(network, layers, image) - logits).abs().max().item()
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{PAGE.name} cannot run this network: {error}") from error
    if not difference < 1e-6:
        raise UserError(f"{PAGE.name} cannot run this network: its logits would differ by {difference:.1e}")
    return network


def fold_norm(block: Block) -> tuple[Tensor, Tensor]:
    """Filters (C_out, C_in, k, k) and biases (C_out,) of one convolution that does what `block`'s and its norm do."""
    scale = block.norm.weight / (block.norm.running_var + block.norm.eps).sqrt()
    filters = block.conv.weight * scale.view(-1, 1, 1, 1)
    return filters, (block.conv.bias - block.norm.running_mean) * scale + block.norm.bias


def forward_as_page(network: dict[str, Any], layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """What forward() in the page computes: images (N, 1, 28, 28) and each layer's weights and biases to logits."""
    activate = {"relu": F.relu, "silu": F.silu}[network["activation"]]
    adaptive_pool = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}[network["adaptive_pool"]]
    *convolutions, fc1, fc2 = layers
    for block, (filters, biases) in zip(network["blocks"], convolutions):
        x = F.conv2d(x, filters, biases, padding="same")
        x = activate(F.max_pool2d(x, 2) if block["pool"] else x)
    x = adaptive_pool(x, 3).flatten(1)
    return F.linear(activate(F.linear(x, *fc1)), *fc2)


EXPORTS = {".onnx": export_onnx, ".html": export_page}  # by the file's ending


def main() -> int:
    args = parse_args()
    device = torch.device("cpu") if args.export else utils.choose_device(args.device)
    model, _ = utils.load_model(args.checkpoint, device)
    if args.export:
        print(f"Wrote {args.export}: {EXPORTS[args.export.suffix](model, args.export)}")
        return 0
    status, to_stdout = 0, args.json == "-"
    if args.images:
        results, status = read_images(model, args.images, quiet=to_stdout)
    else:
        results = measure(model, utils.load_mnist(args.data_dir, train=False, device=device))
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
