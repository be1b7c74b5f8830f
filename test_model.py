"""Measure a trained network on the MNIST test set, or on your own images: `python test_model.py`."""

from __future__ import annotations

import argparse
import base64
import contextlib
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
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import utils
from model import ACTIVATIONS, ADAPTIVE_POOLS, CLASSES, IMAGE_SIZE, Net, count_parameters, kernel_and_stride
from utils import SPLITS, Split, UserError

with contextlib.suppress(ImportError):  # optional, for the photos of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()

PAGE = Path(__file__).resolve().parent / "assets" / "draw.html"


# ---------------------------------------------------------------------------------------------------------------------
# A split


def measure(model: Net, split: Split) -> dict[str, Any]:
    """Everything that is reported of `model` on `split`, ready for JSON; shares are from 0 to 1."""
    logits = utils.predict(model, split.images)
    confusion = utils.confusion_matrix(logits.argmax(1), split.labels)
    count, right = len(split.labels), int(confusion.trace())
    sure = logits.softmax(1).amax(1) > SURE
    return {
        "accuracy": right / count,
        "loss": F.cross_entropy(logits, split.labels).item(),
        "sure": sure.float().mean().item(),
        "sure_count": int(sure.sum()),
        "sure_errors": int((sure & (logits.argmax(1) != split.labels)).sum()),
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
    name, wrong = SPLITS[split].capitalize(), results["sure_errors"]
    rows = {
        "Checkpoint": path,
        "Parameters": f"{results['parameters']:,}",
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


# ---------------------------------------------------------------------------------------------------------------------
# Your own digits: photos and scans, prepared as MNIST's images were (LeCun et al., 1998)

MIN_SIDE, MAX_PIXELS = 8, 64 * 2**20  # smaller and larger images are refused
WORK_SIZE = 512  # pixels a side; larger images are averaged down to this at once
OVERVIEW_SIZE = 96  # pixels; at this size paper, digits, frames and specks are told apart
SKEW_SIZE = 32  # pixels; at this size ink is told from paper by being rare
WINDOW = 2 / 3  # of the shorter side: what is wider is paper, desk or shadow; a thick tight stroke is not
POLARITY = 1.5  # what likeness to strokes weighs against asymmetry in telling dark ink from light
AS_DARK = 0.1  # of a desk may be as dark as the ink on a sheet that lies there
MIN_CONTRAST = 0.03  # of the paper's brightness: fainter marks are taken for paper
INK_LEVEL = 1 / 3  # of the darkest ink's depth: what is fainter is a shadow or noise
MIN_PART = 0.03  # of the digit's ink: smaller parts are specks
MIN_FREE = 0.003  # of the largest part's ink: what lies free of the border is the digit, however wide the desk
OVERLAP = 1 / 3  # of the narrower part's width: parts that share more of it are one digit, slanted ones share some
CRACK = 0.04  # of the ink's height: a gap up to this is a break in a digit
MIN_HEIGHT = 1 / 2  # of the tallest digit: a lower part is a digit's second stroke
MARGIN = 0.12  # of the image's shorter side: ink that stays within it is a frame, a ruled box or the scanner's lid
DIGIT_SIZE = 20  # MNIST's digits fit into 20 x 20 of the 28 x 28 pixels
ZOOM = 3  # the digit is cut out this many times larger
HEIF, HEIF_PACKAGE = {".heic", ".heif"}, "pillow-heif"  # what iPhones take, and what lets Pillow read it
UNSURE, SURE = 0.8, 0.99  # probabilities: below, the second guess is told too; above, an answer counts as sure
MIN_STROKE = 2.0  # of the 20 pixels: thinner pens are thickened; nine tenths of MNIST's strokes are 1.6 to 3.6 wide


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files of `paths` as given, whether they exist or not; folders by what they hold, at any depth, sorted.

    In a folder, endings that Pillow reads count, hidden files do not; a warning says what else it holds. A folder
    without any image stands for itself.
    """
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, skipped = [], []
    for path in paths:
        is_folder = os.path.isdir(path)  # Path.is_dir raises where a name is too long
        files = [file for file in path.rglob("*") if file.is_file()] if is_folder else []
        visible = [file for file in files if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        images = [file for file in visible if file.suffix.lower() in readable]
        skipped += [file.suffix.lower() or "no ending" for file in visible if file.suffix.lower() not in readable]
        found += sorted(images) or [path]
    if skipped:
        kinds = [kind + f" (needs {HEIF_PACKAGE})" * (kind in HEIF) for kind in sorted(set(skipped))]
        utils.warn(f"{len(skipped)} file{'s' * (len(skipped) > 1)} skipped: {', '.join(kinds)}")
    return found


def read_number(path: str | Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB and at most 512 pixels a side, and its digits prepared, uint8 (N, 28, 28), ink 255 on 0.

    Raises UserError, one line naming the file, for what cannot be read, is blank, too small or too large.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: no images in this folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large and odd files; what matters is refused below
            image = open_image(path)
        gray = torch.from_numpy(np.asarray(image.convert("L"), np.float32) / 255)
        return image, prepare_digits(gray)
    except UnidentifiedImageError as error:
        lacks = Path(path).suffix.lower() in HEIF and not HEIF & set(Image.registered_extensions())
        reason = (
            f"needs the package {HEIF_PACKAGE}: pip install {HEIF_PACKAGE}" if lacks else "no image Pillow can read"
        )
        raise UserError(f"{path}: {reason}") from error
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
    for _ in range(2):  # columns, then rows; twenty times as fast as max_pool2d where `side` is large
        image = F.pad(image, [side // 2] * 2, value=-math.inf).t().contiguous().unfold(0, side, 1).amax(2)
    return image


def crop(image: Tensor, mask: Tensor) -> Tensor:
    """(H, W) without the rows and columns around what is set in `mask` (H, W)."""
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def prepare_digits(gray: Tensor) -> Tensor:
    """Brightness (H, W), 0 to 1, of a digit or several side by side -> uint8 (N, 28, 28) as in MNIST, from the left.

    Of dark and light marks those are the ink that look more like it; ValueError if there are none.
    """
    small = fit_within(gray, OVERVIEW_SIZE)
    (paper, ink, digits), (light_paper, light_ink, light) = find_digits(small), find_digits(1 - small)
    if not digits and not light:
        raise ValueError("blank, no ink found")
    if is_light_on_dark(small, digits, light):
        gray, paper, ink, digits = 1 - gray, light_paper, light_ink, light
    depth = ink_depth(gray, resize(paper, *gray.shape))
    places = [dilate(digit.float(), 3) * (digit | ~ink) for digit in digits]  # a pixel around, but nobody else's ink
    return torch.stack([center(thicken(cut_out(depth, resize(place, *gray.shape)))) for place in places])


def close(gray: Tensor) -> Tensor:
    """The paper under the ink: (H, W) without what is dark and narrower than WINDOW, by morphological closing."""
    side = int(WINDOW * min(gray.shape)) // 2 * 2 + 1
    return -dilate(-dilate(gray, side), side)


def ink_depth(gray: Tensor, paper: Tensor) -> Tensor:
    """How much of the paper's light the ink swallows, 0 to 1: (H, W)."""
    return ((paper - gray) / paper.clamp(min=0.05)).clamp(min=0)


def is_light_on_dark(gray: Tensor, dark: list[Tensor], light: list[Tensor]) -> bool:
    """Whether of the marks in (H, W), masks (H, W), the `light` ones are the ink and not the `dark` ones."""
    if not dark or not light:
        return not dark
    dark_ink, light_ink = torch.stack(dark).any(0), torch.stack(light).any(0)
    if lies_on_sheet(dark_ink, light_ink, gray):
        return False
    if lies_on_sheet(light_ink, dark_ink, 1 - gray):
        return True
    return asymmetry(gray) > POLARITY * (stroke_likeness(dark_ink) - stroke_likeness(light_ink))


def lies_on_sheet(ink: Tensor, sheet: Tensor, gray: Tensor) -> bool:
    """Whether dark `ink` lies within a light `sheet`, darker than all around; in a loop one sees what is around."""
    for axis in (0, 1):
        (first, last), (low, high) = extent(ink, axis), extent(sheet, axis)
        if first <= low or last >= high:
            return False
    around = gray[~(ink | sheet)]
    return bool((around <= gray[ink].median()).float().mean() < AS_DARK)


def asymmetry(gray: Tensor) -> float:
    """How much (H, W) is like light ink on dark: ink is rare, which skews the histogram, and not at the border.

    A frame may cover the border, so that it has less of a say.
    """
    gray = fit_within(gray, SKEW_SIZE)
    flat = gray - resize(resize(gray, 3, 3), *gray.shape)  # uneven light makes large differences, ink small ones
    flat = (flat - flat.mean()) / flat.std().clamp(min=1e-6)
    border = torch.cat([flat[0], flat[-1], flat[:, 0], flat[:, -1]]).mean()
    return ((flat**3).mean() - border.clamp(-0.8, 0.8)).item()


def stroke_likeness(mask: Tensor) -> float:
    """Logarithm of the ink's area over its thickness squared, less what of its outline lies on the image's border."""
    ink = core = mask.float()
    thickness = 0
    while core.any():
        core, thickness = -dilate(-core, 3), thickness + 1
    free = (outline(ink) + 1) / (outline(F.pad(ink, [1] * 4)) + 1)
    return math.log(free * ink.sum().item() / thickness**2)


def outline(ink: Tensor) -> float:
    """The length of the edges in `ink` (H, W), 0 to 1, in pixels."""
    return torch.hypot(ink.diff(dim=0)[:, 1:], ink.diff(dim=1)[1:]).sum().item()


def cut_out(depth: Tensor, place: Tensor) -> Tensor:
    """The digit in `depth` (H, W) where `place` (H, W) is not 0, cropped, ink 1 on 0, some 60 pixels a side."""
    digit = fit_within(crop(depth * place, place > 0), ZOOM * (DIGIT_SIZE + 4))
    full = digit[digit > 0.4 * digit.max()].quantile(0.6)  # the middle of a stroke
    ink = (2 * digit / full - 0.5).clamp(0, 1)
    return crop(ink, ink > 0.5)


def find_digits(gray: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The paper of (H, W), its dark ink, and the digits from the left, without frames and specks: masks (H, W)."""
    paper = close(gray)
    depth = ink_depth(gray, paper)
    ink = depth > INK_LEVEL * depth.max()
    if depth.max() < MIN_CONTRAST:
        return paper, ink, []
    parts = number_parts(ink)
    mass = torch.bincount(parts.flatten(), (depth * ink).flatten())
    (height, width), margin = ink.shape, int(MARGIN * min(ink.shape))
    border = torch.cat([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    inside = parts[margin : height - margin, margin : width - margin].flatten()
    free = torch.bincount(border, minlength=len(mass)) == 0
    central = torch.bincount(inside, minlength=len(mass)) > 0
    for can_be, least in ((free, MIN_FREE), (central, MIN_PART)):
        if (mass * can_be).max() > least * mass.max():  # else the digit is cut tightly, or small and in a corner
            mass = mass * can_be
    numbers = (mass >= MIN_PART * mass.max()).nonzero().flatten().tolist()
    return paper, ink, side_by_side([parts == number for number in numbers])


def side_by_side(parts: list[Tensor]) -> list[Tensor]:
    """Masks (H, W) joined to digits, from the left: those above each other, and low ones with what is nearest."""
    digits: list[Tensor] = []
    top, bottom = extent(torch.stack(parts).any(0), 1)
    for part in sorted(parts, key=lambda part: extent(part, 0)):
        (left, right), (first, last) = extent(part, 0), extent(digits[-1] if digits else part, 0)
        shared = min(right, last) - left
        cracked = -CRACK * (bottom - top) <= shared <= 0
        if digits and (cracked or shared > OVERLAP * min(right - left, last - first)):
            digits[-1] = digits[-1] | part
        else:
            digits.append(part)
    while len(digits) > 1:
        heights = [bottom - top for top, bottom in (extent(digit, 1) for digit in digits)]
        low = heights.index(min(heights))
        if heights[low] >= MIN_HEIGHT * max(heights):
            break
        gaps = [extent(after, 0)[0] - extent(before, 0)[1] for before, after in zip(digits, digits[1:])]
        first = low if low == 0 or (low < len(gaps) and gaps[low] < gaps[low - 1]) else low - 1
        digits[first : first + 2] = [digits[first] | digits[first + 1]]
    return digits


def extent(mask: Tensor, axis: int) -> tuple[int, int]:
    """The first column (`axis` 0) or row (1) in which (H, W) is set, and the one behind the last."""
    lines = mask.any(axis).nonzero().flatten()
    return int(lines[0]), int(lines[-1]) + 1


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
    missing = MIN_STROKE * pixel - 2 * ink.sum().item() / outline(ink)
    return dilate(ink, 2 * round(max(missing, 0) / 2) + 1)


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


def read_numbers(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image, Tensor]]:
    """Each of `files` with what `read_number` makes of it; one that cannot be read is a warning, and left out."""
    for path in (bar := tqdm(files, "Reading", leave=False, delay=2, disable=None)):
        try:
            image, digits = read_number(path)
        except UserError as error:
            bar.clear()
            utils.warn(str(error))
        else:
            yield path, image, digits


def read_images(model: Net, files: Sequence[Path]) -> dict[str, Any]:
    """Everything that is reported of those of `files` that can be read, ready for JSON."""
    found = [(path, digits) for path, _, digits in read_numbers(files)]
    probabilities = classify(model, torch.cat([digits for _, digits in found])) if found else torch.empty(0, 10)
    shares = probabilities.split([len(digits) for _, digits in found])
    images = [describe(path, p) for (path, _), p in zip(found, shares)]
    results: dict[str, Any] = {"images": images}
    right = [image["number"] == image["label"] for image in images if "label" in image]
    if right:
        results.update(accuracy=sum(right) / len(right), right=sum(right), labelled=len(right))
    return results


def print_images(results: dict[str, Any]) -> None:
    """A line for each image, and the accuracy if some have labels."""
    for image in results["images"]:
        doubt = f"\tor perhaps {image['second_guess']}" if "second_guess" in image else ""
        print(f"{image['path']}\t{image['number']}\t{image['confidence']:.4f}{doubt}")
    if "accuracy" in results:
        print(f"Accuracy: {results['accuracy']:.2%} ({results['right']} of {results['labelled']})")


def describe(path: Path, probabilities: Tensor) -> dict[str, Any]:
    """What is reported of one image with digits of `probabilities` (N, 10); the label is the name of its folder."""
    confidences, digits = probabilities.max(1)
    number, doubt, label = digits_to_text(digits), second_guess(probabilities), folder_label(path)
    each = [
        {"digit": digit, "confidence": max(shares), "probabilities": shares}
        for digit, shares in zip(digits.tolist(), probabilities.tolist())
    ]
    described = {"path": str(path), "number": number, "confidence": confidences.min().item(), "digits": each}
    return {**described, **({"second_guess": doubt} if doubt else {}), **({"label": label} if label else {})}


def second_guess(probabilities: Tensor) -> str | None:
    """The number of (N, 10) with the least sure digit's second guess, where its probability is below UNSURE."""
    confidences, digits = probabilities.max(1)
    least = int(confidences.argmin())
    digits[least] = probabilities[least].topk(2).indices[1]
    return digits_to_text(digits) if confidences[least] < UNSURE else None


def digits_to_text(digits: Tensor) -> str:
    """Digits (N,) as one writes them."""
    return "".join(map(str, digits.tolist()))


def folder_label(path: Path) -> str | None:
    """The number that the image's folder is named by, if it is."""
    folder = path.absolute().parent.name
    return folder if set(folder) <= set("0123456789") and folder else None


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
        help="read these images, or folders of images, a digit or a number each, instead of a split")  # fmt: skip
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
