"""Your own digits: photos and scans, prepared as MNIST's images were (LeCun et al., 1998)."""

from __future__ import annotations

import contextlib
import glob
import math
import os
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
from tqdm import tqdm

import utils
from model import IMAGE_SIZE, Net
from utils import UserError

with contextlib.suppress(ImportError):  # optional, for the photos of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()

MIN_SIDE, MAX_PIXELS = 8, 64 * 2**20  # smaller and larger images are refused
WORK_SIZE = 512  # pixels a side: larger images are averaged down to this first
OVERVIEW_SIZE = 96  # pixels a side, to find paper, digits, frames and specks
SKEW_SIZE = 32  # pixels a side, to tell ink from paper by its rarity
WINDOW = 2 / 3  # of the shorter side: anything wider is paper, desk or shadow, no stroke
POLARITY = 1.5  # weight of stroke likeness against asymmetry, to tell dark ink from light ink
AS_DARK = 0.1  # share of a desk that may be as dark as the ink on a sheet that lies there
MIN_CONTRAST = 0.03  # of the paper's brightness: fainter marks are paper
INK_LEVEL = 1 / 3  # of the darkest ink's depth: fainter marks are shadow or noise
MIN_PART = 0.03  # of the digit's ink: smaller parts are specks
MIN_FREE = 0.003  # of the largest part's ink: a part of this size, away from the border, is the digit
OVERLAP = 1 / 3  # of the narrower part's width: parts that share more are one digit; slanted neighbours share less
CRACK = 0.04  # of the ink's height: a gap up to this is a break in a digit
MIN_HEIGHT = 1 / 2  # of the tallest digit: a lower part is a digit's second stroke
MARGIN = 0.12  # of the shorter side: ink that stays within it is a frame, a ruled box or the scanner's lid
DIGIT_SIZE = 20  # MNIST's digits fit into 20 x 20 of the 28 x 28 pixels
ZOOM = 3  # factor of the size at which a digit is cut out
MIN_STROKE = 2.0  # of the 20 pixels: thinner pens are thickened; nine tenths of MNIST's strokes are 1.6 to 3.6 wide
UNSURE = 0.8  # probability of the least sure digit, below which the second guess is told too
HEIF, HEIF_PACKAGE = {".heic", ".heif"}, "pillow-heif"  # the format of iPhones, and the package for it


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths` as given, and the images in its folders, at any depth, sorted. Expands * and ? in names.

    An image has an ending that Pillow reads, and is not hidden. A warning names the other files. A folder without any
    image stands for itself.
    """
    paths = [found for path in paths for found in (sorted(map(Path, glob.glob(str(path)))) or [path])]
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
        utils.say("warning", f"{len(skipped)} file{'s' * (len(skipped) > 1)} skipped: {', '.join(kinds)}")
    return found


def read_number(path: str | Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB and at most 512 pixels a side, and its digits prepared, uint8 (N, 28, 28), ink 255 on 0.

    Raises UserError, one line naming the file, if it cannot be read or is blank, too small or too large.
    """
    image = open_image(path)
    digits = prepare_digits(torch.from_numpy(np.asarray(image.convert("L"), np.float32) / 255))
    if not len(digits):
        raise UserError(f"{path}: blank, no ink found")
    return image, digits


def open_image(path: str | Path) -> Image.Image:
    """The first frame as people see it: upright, without transparency, RGB. UserError if it cannot be read."""
    if os.path.isdir(path):
        raise UserError(f"{path}: no images in this folder")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # Pillow warns of large and odd files
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ValueError(f"{width} x {height} pixels are too few, {MIN_SIDE} a side are needed")
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            image.draft(None, (WORK_SIZE, WORK_SIZE))  # a large JPEG is decoded at a half, a quarter or an eighth
            image.load()
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            lacks = Path(path).suffix.lower() in HEIF and not HEIF & set(Image.registered_extensions())
            needs = f"needs the package {HEIF_PACKAGE}: pip install {HEIF_PACKAGE}"
            reason = needs if lacks else "no image Pillow can read"
        raise UserError(f"{path}: {reason}") from error
    if image.mode[0] in "IF":
        image = stretch(image)
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = ImageOps.exif_transpose(image.reduce(math.ceil(max(image.size) / WORK_SIZE)))
    return (on_backdrop(image) if image.mode == "RGBA" else image).convert("RGB")


def stretch(image: Image.Image) -> Image.Image:
    """Grey of 16 bits or in floating point as 8 bits, from black for its darkest value to white for its lightest."""
    image = image.convert("F")
    low, high = image.getextrema()
    scale = 255 / max(high - low, 1e-6)
    return image.point(lambda value: value * scale - low * scale).convert("L")


def on_backdrop(image: Image.Image) -> Image.Image:
    """RGBA on white, or on black if its visible part is light."""
    visible = ImageStat.Stat(image.convert("L"), image.getchannel("A").point(lambda alpha: alpha > 127 and 255))
    backdrop = Image.new("RGBA", image.size, "black" if visible.sum[0] > 127 * visible.count[0] else "white")
    backdrop.alpha_composite(image)
    return backdrop


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (H, W) to (height, width): averages to make it smaller, interpolates to make it larger."""
    return F.interpolate(image[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]


def fit_within(image: Tensor, side: int) -> Tensor:
    """Resize (H, W) in proportion, the longer side to `side` pixels."""
    return resize(image, *(max(1, round(n * side / max(image.shape))) for n in image.shape))


def dilate(image: Tensor, side: int) -> Tensor:
    """The maximum of (H, W) over a square of `side` pixels, an odd number, around each pixel."""
    for _ in range(2):  # columns, then rows: for a large `side` twenty times as fast as max_pool2d
        image = F.pad(image, [side // 2] * 2, value=-math.inf).t().contiguous().unfold(0, side, 1).amax(2)
    return image


def crop(image: Tensor, mask: Tensor) -> Tensor:
    """The smallest rectangle of (H, W) that holds all of `mask` (H, W)."""
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def prepare_digits(gray: Tensor) -> Tensor:
    """The digits in brightness (H, W), 0 to 1, side by side: uint8 (N, 28, 28) as in MNIST, from the left.

    The ink is dark or light, whichever marks look more like strokes.
    """
    small = fit_within(gray, OVERVIEW_SIZE)
    (paper, ink, digits), (light_paper, light_ink, light) = find_digits(small), find_digits(1 - small)
    if not digits and not light:
        return torch.empty(0, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    if is_light_on_dark(small, digits, light):
        gray, paper, ink, digits = 1 - gray, light_paper, light_ink, light
    depth = ink_depth(gray, resize(paper, *gray.shape))
    places = [dilate(digit.float(), 3) * (digit | ~ink) for digit in digits]  # a pixel around, but nobody else's ink
    return torch.stack([center(thicken(cut_out(depth, resize(place, *gray.shape)))) for place in places])


def close(gray: Tensor) -> Tensor:
    """The paper under the ink of (H, W): dark marks narrower than WINDOW are removed, by morphological closing."""
    side = int(WINDOW * min(gray.shape)) // 2 * 2 + 1
    return -dilate(-dilate(gray, side), side)


def ink_depth(gray: Tensor, paper: Tensor) -> Tensor:
    """The share of the paper's light that the ink takes, 0 to 1: (H, W)."""
    return ((paper - gray) / paper.clamp(min=0.05)).clamp(min=0)


def is_light_on_dark(gray: Tensor, dark: list[Tensor], light: list[Tensor]) -> bool:
    """Whether the ink of (H, W) is the `light` marks and not the `dark` ones, all masks (H, W)."""
    if not dark or not light:
        return not dark
    dark_ink, light_ink = torch.stack(dark).any(0), torch.stack(light).any(0)
    if lies_on_sheet(dark_ink, light_ink, gray):
        return False
    if lies_on_sheet(light_ink, dark_ink, 1 - gray):
        return True
    return asymmetry(gray) > POLARITY * (stroke_likeness(dark_ink) - stroke_likeness(light_ink))


def lies_on_sheet(ink: Tensor, sheet: Tensor, gray: Tensor) -> bool:
    """Whether dark `ink` lies on a light `sheet`, and all around the sheet is lighter than the ink."""
    for axis in (0, 1):
        (first, last), (low, high) = extent(ink, axis), extent(sheet, axis)
        if first <= low or last >= high:
            return False
    around = gray[~(ink | sheet)]
    return bool((around <= gray[ink].median()).float().mean() < AS_DARK)


def asymmetry(gray: Tensor) -> float:
    """How much (H, W) looks like light ink on dark: ink is rare, which skews the histogram, and not at the border.

    The border counts less, because it may be a frame.
    """
    gray = fit_within(gray, SKEW_SIZE)
    flat = gray - resize(resize(gray, 3, 3), *gray.shape)  # without uneven light
    flat = (flat - flat.mean()) / flat.std().clamp(min=1e-6)
    border = torch.cat([flat[0], flat[-1], flat[:, 0], flat[:, -1]]).mean()
    return ((flat**3).mean() - border.clamp(-0.8, 0.8)).item()


def stroke_likeness(mask: Tensor) -> float:
    """Logarithm of area / thickness², times the share of the outline that is not on the image's border."""
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
    """The digit in `depth` (H, W) where `place` (H, W) is above 0: cropped, about 60 pixels a side, ink 1 on 0."""
    digit = fit_within(crop(depth * place, place > 0), ZOOM * (DIGIT_SIZE + 4))
    full = digit[digit > 0.4 * digit.max()].quantile(0.6)  # the middle of a stroke
    ink = (2 * digit / full - 0.5).clamp(0, 1)
    return crop(ink, ink > 0.5)


def find_digits(gray: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The paper of (H, W), the mask of its dark ink, and the masks (H, W) of its digits from the left."""
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
        if (mass * can_be).max() > least * mass.max():  # else the digit fills the image, or is small and in a corner
            mass = mass * can_be
    numbers = (mass >= MIN_PART * mass.max()).nonzero().flatten().tolist()
    return paper, ink, side_by_side([parts == number for number in numbers])


def side_by_side(parts: list[Tensor]) -> list[Tensor]:
    """Join parts (masks (H, W)) to digits, from the left: parts above each other, and low parts with the nearest."""
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
    """The first column (`axis` 0) or row (1) of (H, W) that is set somewhere, and the one after the last."""
    lines = mask.any(axis).nonzero().flatten()
    return int(lines[0]), int(lines[-1]) + 1


def number_parts(mask: Tensor) -> Tensor:
    """Number the connected parts of `mask` (H, W), also by corners: int64 (H, W), 0 outside.

    Each pixel starts with its own number. It takes the largest number around it, then the number at that place.
    """
    numbers = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask
    while True:
        largest = (dilate(numbers, 3) * mask).long()
        following = F.pad(largest.flatten().float(), [1, 0])[largest]
        if (following == numbers).all():
            return largest
        numbers = following


def thicken(ink: Tensor) -> Tensor:
    """Make the strokes of cropped `ink` (H, W) at least MIN_STROKE wide; their width is 2 area / perimeter."""
    pixel = max(ink.shape) / DIGIT_SIZE
    ink = F.pad(ink, [2 * ZOOM] * 4)
    missing = MIN_STROKE * pixel - 2 * ink.sum().item() / outline(ink)
    return dilate(ink, 2 * round(max(missing, 0) / 2) + 1)


def center(ink: Tensor) -> Tensor:
    """Fit `ink` (H, W), 0 to 1, into 20 pixels, with its centre of mass at pixel (14, 14) of uint8 (28, 28)."""
    ink = fit_within(crop(ink, ink > 0.5), DIGIT_SIZE)
    (height, width), mass = ink.shape, ink.sum()
    top = round(IMAGE_SIZE / 2 - (torch.arange(float(height)) @ ink.sum(1) / mass).item())
    left = round(IMAGE_SIZE / 2 - (torch.arange(float(width)) @ ink.sum(0) / mass).item())
    ink = F.pad(ink, [left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top])
    return (255 * ink / ink.max()).round().byte()


def classify(model: nn.Module, digits: Tensor) -> Tensor:
    """Probabilities float (N, 10), on the CPU, of prepared digits uint8 (N, 28, 28), of nine looks where unsure."""
    device = next(model.parameters()).device
    return utils.predict(model, digits.unsqueeze(1).to(device), tta=True).softmax(1).cpu()


def read_numbers(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image, Tensor]]:
    """Each of `files` with the result of `read_number`. A file that cannot be read is a warning, and left out."""
    for path in (bar := tqdm(files, "Reading", leave=False, delay=2, disable=None)):
        try:
            image, digits = read_number(path)
        except UserError as error:
            bar.clear()
            utils.say("warning", str(error))
        else:
            yield path, image, digits


def read_images(model: Net, files: Sequence[Path], labels: bool = False) -> dict[str, Any]:
    """Everything that is reported of the `files` that can be read, ready for JSON; shares are from 0 to 1.

    With `labels` the name of an image's folder is the right answer, and the accuracy is reported too.
    """
    found = [(path, digits) for path, _, digits in read_numbers(files)]
    images = describe_all(model, *zip(*found)) if found else []
    results: dict[str, Any] = {"images": images}
    if labels and images:
        for image in images:
            image["label"] = Path(image["path"]).absolute().parent.name
        right = sum(image["number"] == image["label"] for image in images)
        results.update(accuracy=right / len(images), right=right, labelled=len(images))
    return results


def describe_all(model: Net, paths: Sequence[Path], digits: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The report on each image, from its prepared digits uint8 (N, 28, 28)."""
    probabilities = classify(model, torch.cat(list(digits))).split([len(its_digits) for its_digits in digits])
    return list(map(describe, paths, probabilities))


def print_images(results: dict[str, Any]) -> None:
    """Print what `read_images` returned: a line for each image, and the accuracy if they have labels."""
    for image in results["images"]:
        doubt = f"\tor perhaps {image['second_guess']}" if "second_guess" in image else ""
        print(f"{image['path']}\t{image['number']}\t{image['confidence']:.4f}{doubt}")
    if "accuracy" in results:
        print(f"Accuracy: {results['accuracy']:.2%} ({results['right']} of {results['labelled']})")


def describe(path: Path, probabilities: Tensor) -> dict[str, Any]:
    """The report on one image whose digits have `probabilities` (N, 10)."""
    confidences, digits = probabilities.max(1)
    number, doubt = digits_to_text(digits), second_guess(probabilities)
    each = [
        {"digit": digit, "confidence": max(p), "probabilities": p}
        for digit, p in zip(digits.tolist(), probabilities.tolist())
    ]
    described = {"path": str(path), "number": number, "confidence": confidences.min().item(), "digits": each}
    return {**described, **({"second_guess": doubt} if doubt else {})}


def second_guess(probabilities: Tensor) -> str | None:
    """The number with the second guess for the least sure digit of (N, 10), if that is below UNSURE."""
    confidences, digits = probabilities.max(1)
    least = int(confidences.argmin())
    digits[least] = probabilities[least].topk(2).indices[1]
    return digits_to_text(digits) if confidences[least] < UNSURE else None


def digits_to_text(digits: Tensor) -> str:
    """Digits (N,) as a string."""
    return "".join(map(str, digits.tolist()))
