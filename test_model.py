"""Measure a trained network on the MNIST test set, or on your own images: `python test_model.py`."""

from __future__ import annotations

import argparse
import base64
import copy
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageStat
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import utils
from model import ACTIVATIONS, ADAPTIVE_POOLS, CLASSES, IMAGE_SIZE, Net, count_parameters, kernel_and_stride
from utils import SPLITS, Split, UserError

PAGE = Path(__file__).resolve().parent / "assets" / "draw.html"


# ---------------------------------------------------------------------------------------------------------------------
# A split


def measure(model: Net, split: Split) -> dict[str, Any]:
    """Everything that is reported of `model` on `split`, ready for JSON; shares are from 0 to 1."""
    logits = utils.predict(model, split.images)
    confusion = utils.confusion_matrix(logits.argmax(1), split.labels)
    count, right = len(split.labels), int(confusion.trace())
    return {
        "accuracy": right / count,
        "loss": F.cross_entropy(logits, split.labels).item(),
        "count": count,
        "errors": count - right,
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
        for digit in range(CLASSES)
    ]


def print_report(path: Path, split: str, results: dict[str, Any]) -> None:
    """The results as a person reads them."""
    name = SPLITS[split].capitalize()
    rows = {
        "Checkpoint": path,
        "Parameters": f"{results['parameters']:,}",
        f"{name} accuracy": f"{results['accuracy']:.2%}  ({results['errors']} errors in {results['count']:,})",
        f"{name} loss": f"{results['loss']:.4f}",
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


# ---------------------------------------------------------------------------------------------------------------------
# Your own digits: photos and scans, prepared as MNIST's images were (LeCun et al., 1998)

MIN_SIDE, MAX_PIXELS = 8, 64 * 2**20  # smaller and larger images are refused
WORK_SIZE = 512  # pixels a side; larger images are averaged down to this at once
PAPER_SIZE = 32  # at this size the paper's brightness is fitted
OVERVIEW_SIZE = 64  # at this size the digit is told from frames and specks
MIN_CONTRAST = 0.03  # of the paper's brightness: fainter marks are taken for paper
INK_LEVEL = 1 / 3  # of the darkest ink's depth: what is fainter is a shadow or noise
MIN_PART = 0.03  # of the digit's ink: smaller parts are specks
MARGIN = 0.12  # of the image's shorter side: ink that stays within it is a frame, a ruled box or the scanner's lid
DIGIT_SIZE = 20  # MNIST's digits fit into 20 x 20 of the 28 x 28 pixels
ZOOM = 3  # the digit is cut out this many times larger
MIN_STROKE = 2.0  # of the 20 pixels: thinner pens are thickened; nine tenths of MNIST's strokes are 1.6 to 3.6 wide


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files of `paths` as given, whether they exist or not; folders by what they hold, at any depth, sorted.

    In a folder, endings that Pillow reads count, hidden files do not. A folder without any stands for itself.
    """
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    for path in paths:
        is_folder = os.path.isdir(path)  # Path.is_dir raises where a name is too long
        images = [file for file in path.rglob("*") if file.suffix.lower() in readable] if is_folder else []
        visible = [file for file in images if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        found += sorted(visible) or [path]
    return found


def read_digit(path: str | Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB and at most 512 pixels a side, and its digit prepared, uint8 (28, 28), ink 255 on 0.

    Raises UserError, one line naming the file, for what cannot be read, is blank, too small or too large.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: no images in this folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large and odd files; what matters is refused below
            image = open_image(path)
        gray = torch.from_numpy(np.asarray(image.convert("L"), np.float32) / 255)
        return image, prepare_digit(gray)
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: {reason}") from error


def open_image(path: Path) -> Image.Image:
    """The first frame as one sees it: upright, without transparency, RGB; ValueError for an unfit size."""
    with Image.open(path) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"{width} x {height} pixels are too few, {MIN_SIDE} a side are needed")
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")
        image.draft(None, (WORK_SIZE, WORK_SIZE))  # a large JPEG is decoded at a half, a quarter or an eighth
        if image.mode[0] in "IF":
            image = stretch(image)
        elif image.mode not in ("L", "RGB"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = ImageOps.exif_transpose(image.reduce(math.ceil(max(image.size) / WORK_SIZE)))
        return (on_backdrop(image) if image.mode == "RGBA" else image).convert("RGB")


def stretch(image: Image.Image) -> Image.Image:
    """16-bit or floating-point grey in 8 bits: its darkest value becomes black, its lightest white."""
    image = image.convert("F")
    low, high = image.getextrema()
    scale = 255 / max(high - low, 1e-6)
    return image.point(lambda value: value * scale - low * scale).convert("L")


def on_backdrop(image: Image.Image) -> Image.Image:
    """RGBA laid on white, or on black where what is visible is itself light."""
    visible = ImageStat.Stat(image.convert("L"), image.getchannel("A").point(lambda alpha: alpha > 127 and 255))
    backdrop = Image.new("RGBA", image.size, "black" if visible.sum[0] > 127 * visible.count[0] else "white")
    backdrop.alpha_composite(image)
    return backdrop


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(H, W) -> (height, width): averages to make it smaller, interpolates to make it larger."""
    return F.interpolate(image[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]


def fit_within(image: Tensor, side: int) -> Tensor:
    """(H, W) in proportion, its longer side `side` pixels."""
    return resize(image, *(max(1, round(n * side / max(image.shape))) for n in image.shape))


def dilate(image: Tensor, side: int) -> Tensor:
    """The maximum of (H, W) over a square of `side` pixels, an odd number, around each pixel."""
    return F.max_pool2d(image[None, None], side, 1, side // 2)[0, 0]


def crop(image: Tensor, mask: Tensor) -> Tensor:
    """(H, W) without the rows and columns around what is set in `mask` (H, W)."""
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def prepare_digit(gray: Tensor) -> Tensor:
    """Brightness (H, W), 0 to 1, of dark ink or light -> uint8 (28, 28) as in MNIST; ValueError if it is blank."""
    small = fit_within(gray, PAPER_SIZE)
    if is_light_on_dark(small):
        gray, small = 1 - gray, 1 - small
    paper = resize(fit_paper(small), *gray.shape)
    depth = ((paper - gray) / paper.clamp(min=0.05)).clamp(min=0)  # how much of the light the ink swallows
    return center(thicken(cut_out(depth)))


def is_light_on_dark(gray: Tensor) -> bool:
    """Whether ink is lighter than the paper in (H, W): ink is rare, which skews the histogram, and not at the border.

    A frame may cover the border, so that it has less of a say.
    """
    flat = gray - resize(resize(gray, 3, 3), *gray.shape)  # uneven light makes large differences, ink small ones
    flat = (flat - flat.mean()) / flat.std().clamp(min=1e-6)
    border = torch.cat([flat[0], flat[-1], flat[:, 0], flat[:, -1]]).mean()
    return bool((flat**3).mean() > border.clamp(-0.8, 0.8))


def fit_paper(gray: Tensor) -> Tensor:
    """What (H, W) would be without its dark ink: a quadratic surface with a quarter of the pixels above it.

    Quantile regression by reweighted least squares. It follows a lamp, a window or a lens, and is too stiff for ink.
    """
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in gray.shape), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], 2).view(-1, 6)
    brightness, weight = gray.reshape(-1, 1), torch.ones(gray.numel(), 1)
    for _ in range(5):
        surface = terms @ torch.linalg.lstsq(weight * terms, weight * brightness).solution
        above = brightness - surface
        weight = (torch.where(above > 0, 0.75, 0.25) / above.abs().clamp(min=0.01)).sqrt()
    return surface.view_as(gray)


def cut_out(depth: Tensor) -> Tensor:
    """The digit in `depth` (H, W), cropped, ink 1 on 0, some 60 pixels a side; ValueError if there is none."""
    overview = fit_within(depth, OVERVIEW_SIZE)
    if overview.max() < MIN_CONTRAST:
        raise ValueError("blank, no ink found")
    place = resize(select_digit(overview), *depth.shape)
    digit = fit_within(crop(depth * place, place > 0), ZOOM * (DIGIT_SIZE + 4))
    full = digit[digit > 0.4 * digit.max()].quantile(0.6)  # the middle of a stroke
    ink = (2 * digit / full - 0.5).clamp(0, 1)
    return crop(ink, ink > 0.5)


def select_digit(depth: Tensor) -> Tensor:
    """1 in (H, W) where the digit is and a pixel around, 0 elsewhere: all parts of the ink but frames and specks."""
    ink = depth > INK_LEVEL * depth.max()
    parts = number_parts(ink)
    mass = torch.bincount(parts.flatten(), (depth * ink).flatten())
    (height, width), margin = ink.shape, int(MARGIN * min(ink.shape))
    inside = parts[margin : height - margin, margin : width - margin].flatten()
    mass_inside = mass * (torch.bincount(inside, minlength=len(mass)) > 0)
    if mass_inside.max() > MIN_PART * mass.max():  # else a small digit lies in a corner
        mass = mass_inside
    digit = ink & (mass >= MIN_PART * mass.max())[parts]
    return dilate(digit.float(), 3) * (digit | ~ink)


def number_parts(mask: Tensor) -> Tensor:
    """Connected parts of `mask` (H, W), corners touching: int64 (H, W), the same number all over a part, 0 outside.

    Each pixel takes the largest number around it, then the number that the pixel of this number has by now.
    """
    numbers = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask
    while True:
        largest = (dilate(numbers, 3) * mask).long()
        following = F.pad(largest.flatten().float(), [1, 0])[largest]
        if (following == numbers).all():
            return largest
        numbers = following


def thicken(ink: Tensor) -> Tensor:
    """Cropped `ink` (H, W) with strokes of at least MIN_STROKE; their width is 2 area / perimeter."""
    pixel = max(ink.shape) / DIGIT_SIZE
    ink = F.pad(ink, [2 * ZOOM] * 4)
    perimeter = torch.hypot(ink.diff(dim=0)[:, 1:], ink.diff(dim=1)[1:]).sum()
    missing = MIN_STROKE * pixel - 2 * ink.sum() / perimeter
    return dilate(ink, 2 * round(max(missing.item(), 0) / 2) + 1)


def center(ink: Tensor) -> Tensor:
    """`ink` (H, W), 0 to 1, fitted into 20 pixels, its centre of mass at pixel (14, 14) of uint8 (28, 28)."""
    ink = fit_within(crop(ink, ink > 0.5), DIGIT_SIZE)
    (height, width), mass = ink.shape, ink.sum()
    top = round(IMAGE_SIZE / 2 - (torch.arange(float(height)) @ ink.sum(1) / mass).item())
    left = round(IMAGE_SIZE / 2 - (torch.arange(float(width)) @ ink.sum(0) / mass).item())
    ink = F.pad(ink, [left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top])
    return (255 * ink / ink.max()).round().byte()


def classify(model: nn.Module, digits: Tensor) -> Tensor:
    """Probabilities float (N, 10), on the CPU, of prepared digits uint8 (N, 28, 28)."""
    device = next(model.parameters()).device
    return utils.predict(model, digits.unsqueeze(1).to(device)).softmax(1).cpu()


def read_digits(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image, Tensor]]:
    """Each of `files` with what `read_digit` makes of it; one that cannot be read is a warning, and left out."""
    for path in (bar := tqdm(files, "Reading", leave=False, delay=2, disable=None)):
        try:
            image, digit = read_digit(path)
        except UserError as error:
            bar.clear()
            utils.warn(str(error))
        else:
            yield path, image, digit


def read_images(model: Net, files: Sequence[Path]) -> dict[str, Any]:
    """Everything that is reported of those of `files` that can be read, ready for JSON."""
    found = [(path, digit) for path, _, digit in read_digits(files)]
    probabilities = classify(model, torch.stack([digit for _, digit in found])) if found else torch.empty(0, 10)
    images = [describe(path, p.tolist()) for (path, _), p in zip(found, probabilities)]
    results: dict[str, Any] = {"images": images}
    right = [image["digit"] == image["label"] for image in images if "label" in image]
    if right:
        results.update(accuracy=sum(right) / len(right), right=sum(right), labelled=len(right))
    return results


def print_images(results: dict[str, Any]) -> None:
    """A line for each image, and the accuracy if some have labels."""
    for image in results["images"]:
        print(f"{image['path']}\t{image['digit']}\t{image['confidence']:.4f}")
    if "accuracy" in results:
        print(f"Accuracy: {results['accuracy']:.2%} ({results['right']} of {results['labelled']})")


def describe(path: Path, probabilities: list[float]) -> dict[str, Any]:
    """What is reported of one image; the label is the name of its folder, where that is a digit."""
    confidence = max(probabilities)
    digit, label = probabilities.index(confidence), folder_label(path)
    shares = {"confidence": confidence, "probabilities": probabilities}
    return {"path": str(path), "digit": digit, **shares, **({} if label is None else {"label": label})}


def folder_label(path: Path) -> int | None:
    """The digit that the image's folder is named by, if it is."""
    folder = path.absolute().parent.name
    return int(folder) if folder in set("0123456789") else None


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
    images = torch.rand(3, 1, IMAGE_SIZE, IMAGE_SIZE)
    exported = without_adaptive_max_pools(model, images)
    if not torch.allclose(exported(images), model(images), atol=1e-5):
        raise UserError("not exported: ONNX has no adaptive max pooling, and no fixed windows do the same here")
    with utils.atomic_write(path) as temporary:
        try:
            torch.onnx.export(
                exported, (images,), str(temporary), opset_version=18, input_names=["image"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = re.sub(r"\x1b\[\d*m", "", str(error)).strip().splitlines()[0]  # without its colours
            raise UserError(f"not exported, torch.onnx cannot express this network: {reason}") from error
        return check_onnx(temporary, model, images)


def without_adaptive_max_pools(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `model` with each adaptive max pool, which ONNX lacks, as a max pool with the same windows."""
    exported, sizes = copy.deepcopy(model), {}
    pools = {name: module for name, module in exported.named_modules() if isinstance(module, nn.AdaptiveMaxPool2d)}
    for pool in pools.values():
        pool.register_forward_hook(lambda pool, x, y: sizes.update({pool: (x[0].shape[-1], y.shape[-1])}))
    exported(images)
    for name, pool in pools.items():
        if pool in sizes:
            exported.set_submodule(name, nn.MaxPool2d(*kernel_and_stride(pool, *sizes[pool])))
    return exported


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
    network = page_network(model, page, json.loads(old)["digit"])
    with utils.atomic_write(path) as temporary:
        temporary.write_bytes((before + json.dumps(network) + after).encode())
    return "open it in a browser"


def page_network(model: Net, page: str, digit: str) -> dict[str, Any]:
    """`model` as `page` reads it: shapes, weights, and its logits for `digit`, 784 bytes in base64.

    Computed in float64, so that the rounded numbers do not depend on the processor. UserError as export_page.
    """
    model = copy.deepcopy(model).cpu().double().requires_grad_(False)
    image = torch.tensor(list(base64.b64decode(digit))).view(1, 1, 28, 28).double() / 255
    activation = model.architecture["activation"]
    try:
        if (IMAGE_SIZE, CLASSES) != (28, 10):
            raise ValueError("it is for ten digits of 28x28")
        if f" {activation}: " not in re.search(r"const ACTIVATIONS = \{.*?\};", page, re.DOTALL)[0]:
            raise ValueError(f"it has no activation {activation}; add it to ACTIVATIONS in assets/draw.html")
        logits = model(image)
        layers = [fuse_conv_bn_eval(block.conv, block.norm) for block in model.blocks] + [model.fc1, model.fc2]
        shapes = [list(layer.weight.shape) for layer in layers]
        pools = [isinstance(block.pool, nn.MaxPool2d) for block in model.blocks]
        numbers = torch.cat([part.flatten() for layer in layers for part in (layer.weight, layer.bias)]).float().numpy()
        network = {
            "activation": activation,
            "adaptive_pool": model.architecture["adaptive_pool"],
            "blocks": [{"shape": shape, "pool": pool} for shape, pool in zip(shapes, pools)],
            "fc1": {"shape": shapes[-2]},
            "fc2": {"shape": shapes[-1]},
            "digit": digit,
            "logits": [round(logit, 3) for logit in logits[0].tolist()],
            "weights": base64.b64encode(numbers.astype("<f4").tobytes()).decode(),
        }
        difference = (forward_as_page(network, layers, image) - logits).abs().max().item()
        if not difference < 1e-6:
            raise ValueError(f"its logits would differ by {difference:.1e}")
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        blocks = "blocks of convolution, batch normalisation, max pooling and activation"
        raise UserError(f"{PAGE.name} cannot run this network, only {blocks}: {error}") from error
    return network


def forward_as_page(network: dict[str, Any], layers: list[nn.Module], x: Tensor) -> Tensor:
    """What forward() in the page computes: images (N, 1, 28, 28) and the layers' weights and biases to logits."""
    activate = ACTIVATIONS[network["activation"]]()
    *convolutions, fc1, fc2 = layers
    for block, conv in zip(network["blocks"], convolutions):
        if block["shape"][2] % 2 == 0 or block["shape"][3] % 2 == 0:
            raise ValueError("filters of an even size have no middle")
        x = F.conv2d(x, conv.weight, conv.bias, padding="same")
        x = activate(F.max_pool2d(x, 2) if block["pool"] else x)
    x = ADAPTIVE_POOLS[network["adaptive_pool"]](3)(x).flatten(1)
    return fc2(activate(fc1(x)))


EXPORTS = {".onnx": export_onnx, ".html": export_page}  # by the file's ending


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Test accuracy of a checkpoint, or the digits it reads in your images."
    )
    utils.add_common_flags(parser)
    utils.add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--json", metavar="PATH",
        help="also write the results as JSON, all shares from 0 to 1; - writes only that, to stdout")  # fmt: skip
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="read these images, or folders of images, one handwritten digit each, instead of a split")  # fmt: skip
    add("--export", type=Path, metavar="FILE",
        help="write the network to FILE instead: as ONNX (.onnx), or as a page to draw digits on (.html)")  # fmt: skip
    args = parser.parse_args()
    if args.export and (args.images or args.json):
        raise UserError("--export goes with neither --images nor --json")
    if args.export and args.export.suffix not in EXPORTS:
        raise UserError(f"--export {args.export}: the name must end in {' or '.join(EXPORTS)}")
    return args


def main() -> int:
    args = parse_args()
    device = torch.device("cpu") if args.export else utils.choose_device(args.device)
    model, checkpoint = utils.load_model(args.checkpoint, device)
    if args.export:
        print(f"Wrote {args.export}: {EXPORTS[args.export.suffix](model, args.export)}")
        return 0
    status = 0
    if args.images:
        files = find_images(args.images)
        results = read_images(model, files)
        status = int(len(results["images"]) < len(files))  # 1 if some could not be read
    else:
        split = utils.load_split(args.split, args.data_dir, checkpoint, device)
        results = {"split": args.split, **measure(model, split)}
    if args.json == "-":
        print(json.dumps(results, indent=2))
    elif args.images:
        print_images(results)
    else:
        print_report(args.checkpoint, args.split, results)
    if args.json not in (None, "-"):
        utils.write_json(Path(args.json), results)
    return status


if __name__ == "__main__":
    utils.run_script(main)
