"""Your own digits: photos and scans, prepared as MNIST's images were (LeCun et al., 1998).

`gray` is brightness, float (H, W), 0 to 1. `depth` is the share of the paper's light that the ink
takes, float (H, W), 0 to 1. A "part" is ink that hangs together (a connected component). Levels are
shares of a depth, and lengths are shares of a digit's height, where no unit is given.
"""

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
from model import IMAGE_SIZE
from utils import UserError

with contextlib.suppress(ImportError):  # optional, for the photos of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()


# --- Reports ----------------------------------------------------------------------------------

UNSURE = 0.8  # probability of the least sure digit, below which the second guess is told too


def read_images(
    model: nn.Module, paths: Sequence[Path], labels: bool = False
) -> tuple[dict[str, Any], int]:
    """All that is reported of the images in `paths`, ready for JSON, and how many were not read.

    With `labels` the name of an image's folder is the right answer, and the accuracy, from 0 to 1,
    is reported too.
    """
    files = find_images(paths)
    images = [report for _, _, report in read_files(model, files)]
    results: dict[str, Any] = {"images": images}
    if labels and images:
        for image in images:
            image["label"] = Path(image["path"]).absolute().parent.name
        right = sum(image["number"] == image["label"] for image in images)
        results.update(accuracy=right / len(images), right=right, labelled=len(images))
    return results, len(files) - len(images)


def print_images(results: dict[str, Any]) -> None:
    """Print what `read_images` returned: a line for each image, and the accuracy if known."""
    for image in results["images"]:
        guess = f"\tor perhaps {image['second_guess']}" if "second_guess" in image else ""
        print(f"{image['path']}\t{image['number']}\t{image['confidence']:.4f}{guess}")
    if "accuracy" in results:
        share = f"{results['right']} of {results['labelled']}"
        print(f"Accuracy: {results['accuracy']:.2%} ({share})")


def read_files(
    model: nn.Module, files: Sequence[Path]
) -> Iterator[tuple[Image.Image, Tensor, dict[str, Any]]]:
    """Each of `files`: the image, its digits uint8 (N, 28, 28), and the report.

    A file that cannot be read is a warning, and left out.
    """
    for path in (bar := tqdm(files, "Reading", leave=False, delay=2, disable=None)):
        try:
            image, rows = read_rows(path)
        except UserError as error:
            bar.clear()
            utils.say("warning", str(error))
            continue
        digits = torch.cat(rows)
        yield image, digits, describe(path, classify(model, digits), [len(row) for row in rows])


def classify(model: nn.Module, digits: Tensor) -> Tensor:
    """Probabilities float (N, 10), on the CPU, of prepared digits uint8 (N, 28, 28).

    They are the mean of nine looks where one look is unsure.
    """
    device = next(model.parameters()).device
    return utils.predict(model, digits.unsqueeze(1).to(device), tta=True).softmax(1).cpu()


def describe(path: Path, probabilities: Tensor, row_lengths: Sequence[int]) -> dict[str, Any]:
    """The report on one image: `probabilities` (N, 10) of its digits, so many in each row."""
    confidences, digits = probabilities.max(1)
    report = {
        "path": str(path),
        "number": digits_to_text(digits, row_lengths),
        "confidence": confidences.min().item(),
        "digits": [
            {"digit": digit, "confidence": confidence, "probabilities": shares}
            for digit, confidence, shares in zip(
                digits.tolist(), confidences.tolist(), probabilities.tolist()
            )
        ],
    }
    guess = second_guess(probabilities, row_lengths)
    return {**report, "second_guess": guess} if guess else report


def second_guess(probabilities: Tensor, row_lengths: Sequence[int] = ()) -> str | None:
    """The number with the second guess for the least sure digit of (N, 10), if below UNSURE."""
    confidences, digits = probabilities.max(1)
    least = int(confidences.argmin())
    if confidences[least] >= UNSURE:
        return None
    digits[least] = probabilities[least].topk(2).indices[1]
    return digits_to_text(digits, row_lengths)


def digits_to_text(digits: Tensor, row_lengths: Sequence[int] = ()) -> str:
    """Digits (N,) as a string, with a blank between rows of so many; one row if not told."""
    rows = digits.split(list(row_lengths) or len(digits))
    return " ".join("".join(map(str, row.tolist())) for row in rows)


# --- Files ------------------------------------------------------------------------------------

MIN_SIDE = 8  # pixels: smaller images are refused
MAX_PIXELS = 64 * 2**20  # larger images are refused
WORK_SIZE = 512  # pixels a side: larger images are averaged down to this first
DARK = 0.05  # of what is visible: with less of it dark, a transparent image is a light drawing
HEIF = {".heic", ".heif"}  # the format of iPhones
HEIF_PACKAGE = "pillow-heif"


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths` as given, and the images in its folders, at any depth, sorted.

    Expands * and ? in names. An image has an ending that Pillow reads, and is not hidden. A warning
    names the other files. A folder without any image stands for itself.
    """
    readable = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    skipped = []
    for path in expand_patterns(paths):
        files = visible_files(path) if os.path.isdir(path) else []  # Path's fails on long names
        found += sorted(file for file in files if file.suffix.lower() in readable) or [path]
        skipped += [file.suffix.lower() for file in files if file.suffix.lower() not in readable]
    if skipped:
        kinds = [
            (kind or "no ending") + f" (needs {HEIF_PACKAGE})" * (kind in HEIF)
            for kind in sorted(set(skipped))
        ]
        plural = "s" * (len(skipped) > 1)
        utils.say("warning", f"{len(skipped)} file{plural} skipped: {', '.join(kinds)}")
    return found


def expand_patterns(paths: Sequence[Path]) -> Iterator[Path]:
    """`paths`, with the files that match * and ? where a path does not exist as it is written."""
    for path in paths:
        matches = [] if os.path.exists(path) else sorted(map(Path, glob.glob(str(path))))
        yield from matches or [path]


def visible_files(folder: Path) -> list[Path]:
    """The files below `folder`, at any depth, without those whose name or folder begins with ."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts)]


def read_number(path: str | Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB, at most 512 pixels a side, and its digits: uint8 (N, 28, 28).

    The digits are prepared: ink 255 on 0. Raises UserError, one line naming the file, if it cannot
    be read or is blank, too small or too large.
    """
    image, rows = read_rows(path)
    return image, torch.cat(rows)


def read_rows(path: str | Path) -> tuple[Image.Image, list[Tensor]]:
    """As `read_number`, with the digits of each row by themselves, from the top."""
    image = open_image(path)
    for channel in (image.convert("L"), *image.split()):  # red ink on green may be blank in grey
        rows = find_digits(torch.from_numpy(np.asarray(channel, np.float32) / 255))
        if rows:
            return image, rows
    raise UserError(f"{path}: blank, no ink found")


def open_image(path: str | Path) -> Image.Image:
    """The image as people see it: upright, RGB, without transparency, at most 512 pixels a side.

    Raises UserError, one line naming the file.
    """
    image = load_image(path)
    if image.mode[0] in "IF":  # 16 bits or floating point, to be stretched
        values = np.asarray(ImageOps.exif_transpose(image), np.float32)
        values = (values - values.min()) * (255 / max(np.ptp(values), 1e-6))
        image = Image.fromarray(np.uint8(values))
    elif image.mode not in ("L", "RGB") or image.has_transparency_data:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = ImageOps.exif_transpose(image.reduce(math.ceil(max(image.size) / WORK_SIZE)))
    return (on_backdrop(image) if image.mode == "RGBA" else image).convert("RGB")


def load_image(path: str | Path) -> Image.Image:
    """The image at `path` as it is stored; UserError, one line, if it cannot be read."""
    if os.path.isdir(path):
        raise UserError(f"{path}: no images in this folder")
    try:
        with warnings.catch_warnings(record=True), Image.open(path) as image:  # of odd files
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                least = f"{MIN_SIDE} a side are needed"
                raise ValueError(f"{width} x {height} pixels are too few, {least}")
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            image.draft(None, (WORK_SIZE, WORK_SIZE))  # decodes a large JPEG at a half or less
            if image.format == "GIF":
                image.seek(image.n_frames - 1)  # a digit that draws itself is complete at the end
            image.load()
            return image
    except UnidentifiedImageError as error:
        lacks = Path(path).suffix.lower() in HEIF and not HEIF & set(Image.registered_extensions())
        needs = f"needs the package {HEIF_PACKAGE}: pip install {HEIF_PACKAGE}"
        raise UserError(f"{path}: {needs if lacks else 'no image Pillow can read'}") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or utils.one_line(error) or type(error).__name__
        raise UserError(f"{path}: {reason}") from error


def on_backdrop(image: Image.Image) -> Image.Image:
    """RGBA on white, or on black if all of its visible part is light, but for an edge."""
    visible = image.getchannel("A").point(lambda alpha: alpha > 127 and 255)
    dark = ImageStat.Stat(image.convert("L").point(lambda value: value < 128 and 255), visible)
    is_light = dark.sum[0] <= 255 * DARK * dark.count[0]
    backdrop = Image.new("RGBA", image.size, "black" if is_light else "white")
    backdrop.alpha_composite(image)
    return backdrop


# --- From an image to rows of parts -----------------------------------------------------------

OVERVIEW_SIZE = 128  # pixels a side: a digit in a row of ten is still ten pixels high
WINDOW = 2 / 5  # of the shorter side: wider than strokes, narrower than most shadows and sheets
NARROW = 3 / 4  # of a digit's height, once it is known: anything wider is no stroke


def find_digits(gray: Tensor) -> list[Tensor]:
    """The digits in `gray`, as in MNIST: uint8 (N, 28, 28) for each row from the top.

    Paper and rows are found twice. The second time the height of the digits is known, and paper is
    what is wider than their strokes.
    """
    overview = fit_within(gray, OVERVIEW_SIZE)
    tile = find_tile(overview)
    if tile:
        top, bottom, left, right = (round(n * max(gray.shape) / OVERVIEW_SIZE) for n in tile)
        rows = find_digits(gray[top:bottom, left:right])
        if rows:
            return rows
    pixel = pixel_width(gray, overview)
    window = int(WINDOW * min(overview.shape))
    dark, light = (
        sum(find_rows(ink_depth(side, find_paper(side, window)), pixel), [])
        for side in (overview, 1 - overview)
    )
    ink_is_light = is_ink_light(overview, dark, light)
    if ink_is_light:
        gray = 1 - gray
        overview = 1 - overview
    height = typical_height(light if ink_is_light else dark)
    paper = find_paper(overview, min(window, int(NARROW * height)))
    rows = find_rows(ink_depth(overview, paper), pixel, FAINT)
    digits = [cut_row(gray, paper, row) for row in rows]
    return [torch.stack(row) for row in digits if row]


def pixel_width(gray: Tensor, overview: Tensor) -> int:
    """The width of a pixel of `gray` in its `overview`, in pixels: 1, or more for a tiny image."""
    return math.ceil(max(overview.shape) / max(gray.shape))


def find_paper(gray: Tensor, window: int) -> Tensor:
    """`gray` without the dark marks that are narrower than `window` pixels: a closing."""
    side = window // 2 * 2 + 1
    return -dilate(-dilate(gray, side), side)


def ink_depth(gray: Tensor, paper: Tensor) -> Tensor:
    """The share of the light of `paper` (H, W) that the ink in `gray` (H, W) takes: (H, W)."""
    return ((paper - gray) / paper.clamp(min=0.05)).clamp(min=0)


# --- Whether ink is dark or light, and tiles --------------------------------------------------

SKEW_SIZE = 32  # pixels a side, to tell ink from paper by its rarity
POLARITY = 3 / 4  # weight of stroke likeness against asymmetry
USUAL = 1.0  # of stroke likeness: what dark ink, the usual one, has ahead
BORDER = 0.25  # at most, of asymmetry: a tight digit has paper at the border, a sheet has a desk
TILE = 1 / 4  # of the longer side: a smaller rectangle is no tile
SOLID = 0.9  # of an edge: what is less complete is no tile


def is_ink_light(gray: Tensor, dark: list[Part], light: list[Part]) -> bool:
    """Whether in `gray` the parts of `light` ink are the digits, and not those of `dark` ink.

    Ink is what looks more like strokes, is rarer and is not at the border.
    """
    if not (dark and light):
        return not dark
    likeness = USUAL + stroke_likeness(dark) - stroke_likeness(light)
    return asymmetry(gray) > POLARITY * likeness


def stroke_likeness(parts: list[Part]) -> float:
    """Logarithm of a part's mean area / width², a stroke's width being 2 area / perimeter."""
    mask = mask_of(parts, torch.empty(OVERVIEW_SIZE, OVERVIEW_SIZE)).float()
    return math.log(outline(mask) ** 2 / 4 / mask.sum().item() / len(parts))


def asymmetry(gray: Tensor) -> float:
    """How much `gray` looks like light ink on dark.

    Ink is rare, which skews the histogram, and it is not at the border.
    """
    gray = fit_within(gray, SKEW_SIZE)
    flat = gray - resize(resize(gray, 3, 3), *gray.shape)  # without uneven light
    flat = (flat - flat.mean()) / flat.std().clamp(min=1e-6)
    border = torch.cat([flat[0], flat[-1], flat[:, 0], flat[:, -1]]).mean()
    return ((flat**3).mean() - border.clamp(-BORDER, BORDER)).item()


def find_tile(gray: Tensor) -> tuple[int, int, int, int] | None:
    """The inside of a solid rectangle, darker or lighter than what is around it.

    Such is the saved figure of a digit. It is top, bottom, left, right, in pixels.
    """
    height, width = gray.shape
    flat = gray - (gray.min() + gray.max()) / 2
    for part in find_parts(flat, 0) + find_parts(-flat, 0):
        is_large = min(part.height, part.width) > TILE * max(height, width)
        if is_large and part.height < height and part.width < width and is_solid(part):
            return part.top + 3, part.bottom - 3, part.left + 3, part.right - 3
    return None


def is_solid(part: Part) -> bool:
    """Whether `part` fills half of its box, and nearly all of it near each of the four edges."""
    rows = np.bincount(part.y - part.top)
    columns = np.bincount(part.x - part.left)
    is_wide = min(rows[2], rows[-3]) > SOLID * part.width
    is_high = min(columns[2], columns[-3]) > SOLID * part.height
    return bool(is_wide and is_high) and len(part.y) > part.height * part.width / 2


# --- Parts ------------------------------------------------------------------------------------

MIN_PIXELS = 4  # smaller parts are noise
MAX_PARTS = 60  # so are more parts


class Part:
    """Ink that hangs together: its depth `ink` (n,) at `y` and `x` (n,), and the box around it."""

    def __init__(self, y: np.ndarray, x: np.ndarray, ink: np.ndarray) -> None:
        self.y = y
        self.x = x
        self.ink = ink
        self.mass = float(ink.sum())
        self.top = int(y.min())
        self.bottom = int(y.max()) + 1
        self.left = int(x.min())
        self.right = int(x.max()) + 1
        self.height = self.bottom - self.top
        self.width = self.right - self.left

    def gap(self, other: Part) -> int:
        """How far apart the boxes are, along x or y, whichever is more; 0 where they meet."""
        along = max(self.left, other.left) - min(self.right, other.right)
        across = max(self.top, other.top) - min(self.bottom, other.bottom)
        return max(along, across, 0)

    def is_inside(self, other: Part) -> bool:
        """Whether the box of `other` surrounds this one's."""
        is_between = other.left < self.left and self.right < other.right
        return is_between and other.top < self.top and self.bottom < other.bottom

    def is_off_border(self, image: Tensor) -> bool:
        """Whether this part does not touch the border of `image` (H, W)."""
        height, width = image.shape
        return 0 < self.top and self.bottom < height and 0 < self.left and self.right < width

    def is_in_line(self, other: Part) -> bool:
        """Whether more than half of the height of the less high one is beside the other."""
        shared = min(self.bottom, other.bottom) - max(self.top, other.top)
        return shared > min(self.height, other.height) / 2


def find_parts(depth: Tensor, level: float) -> list[Part]:
    """The parts of what is deeper than `level` in `depth` (H, W), the heaviest first.

    Pixels that touch, also by corners, hang together. Each pixel starts with its own number. Those
    that touch take the smaller of their numbers, until none differ.
    """
    mask = F.pad(depth > level, [1] * 4).numpy()
    numbers = np.cumsum(mask).reshape(mask.shape) * mask
    here = numbers[:-1, 1:-1]
    neighbours = numbers[:-1, 2:], numbers[1:, :-2], numbers[1:, 1:-1], numbers[1:, 2:]
    pairs = [np.stack([here, there])[:, (here > 0) & (there > 0)] for there in neighbours]
    a, b = np.concatenate(pairs, 1)
    number = np.arange(mask.sum() + 1)
    while len(a):
        np.minimum.at(number, np.maximum(a, b), np.minimum(a, b))
        while (number != number[number]).any():
            number = number[number]
        a, b = number[np.stack([a, b])][:, number[a] != number[b]]
    y, x = (places - 1 for places in mask.nonzero())
    ink = depth.numpy()[y, x]
    order = np.argsort(number[1:], kind="stable")
    pieces = np.split(order, np.flatnonzero(np.diff(number[1:][order])) + 1)
    parts = [Part(y[p], x[p], ink[p]) for p in pieces if len(p) >= MIN_PIXELS]
    return sorted(parts, key=lambda part: -part.mass)[:MAX_PARTS]


def mask_of(parts: list[Part], like: Tensor) -> Tensor:
    """Where `parts` are: bool of the size of `like` (H, W)."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for part in parts:
        mask[part.y, part.x] = True
    return mask


def typical_height(parts: list[Part]) -> int:
    """The height that half of the ink does not exceed; 0 without ink."""
    if not parts:
        return 0
    pixels = [len(part.y) for part in parts]
    return int(np.median(np.repeat([part.height for part in parts], pixels)))


# --- Rows -------------------------------------------------------------------------------------

MIN_CONTRAST = 0.03  # of the paper's brightness: fainter marks are paper
INK_LEVEL = 1 / 3  # of the darkest ink's depth: fainter marks are shadow or noise
FAINT = 1 / 2  # of that level: enough for ink that touches ink, so that light strokes do not break
MIN_STEP = 0.4  # of the depth, from pixel to pixel: ink has edges, shadows and folds at most 0.3
MIN_FREE = 0.003  # of the heaviest part's ink: a part of it, away from the border, is the digit
ENCLOSED = 0.05  # of a part's ink: with as much inside, it is a frame; specks in a zero are less
FLAT = 8  # times its own height: a part that is wider, and wider than digits are high, is a line
MIN_HEIGHT = 1 / 2  # a lower part starts no row
NEAR = 1 / 2  # a small part belongs to a digit that is nearer than this


def find_rows(depth: Tensor, pixel: int, faint: float = 1.0) -> list[list[Part]]:
    """The ink in `depth` (H, W) that may be digits, as rows from the top.

    A pixel of the image is `pixel` pixels wide here. Ink that touches ink need be only `faint`
    times as deep.
    """
    parts = find_parts(depth, INK_LEVEL * depth.max())
    inner = [part for part in parts if part.is_off_border(depth)]
    darkest = (inner[0].ink if inner else depth).max().item()
    level = max(INK_LEVEL * darkest, MIN_CONTRAST)
    around = 2 * pixel + 1
    step = dilate(depth, around) + dilate(-depth, around)
    parts = [
        part
        for part in find_parts(depth, faint * level)
        if part.ink.max() > level
        and np.quantile(step[part.y, part.x], 0.9) > MIN_STEP * part.ink.max()
    ]
    inner = [part for part in parts if part.is_off_border(depth)]
    if not inner or inner[0].mass <= MIN_FREE * parts[0].mass:
        inner = parts
    marks = [part for part in inner if not is_frame(part, inner)]
    return group_rows(marks, parts) if marks else []


def is_frame(part: Part, parts: list[Part]) -> bool:
    """Whether other `parts`, with ink that counts, are inside of `part`."""
    return sum(p.mass for p in parts if p.is_inside(part)) > ENCLOSED * part.mass


def group_rows(marks: list[Part], parts: list[Part]) -> list[list[Part]]:
    """Rows from the top, of `marks` and of those other `parts` that stand in line with them."""
    height = typical_height(marks)
    marks = [m for m in marks if m.width <= max(FLAT * m.height, height)] or marks  # no lines
    height = typical_height(marks)
    tall = [mark for mark in marks if mark.height >= MIN_HEIGHT * height]
    rows: list[list[Part]] = []
    for part in sorted(tall, key=lambda part: part.left):
        two_strokes = len(tall) == 2 and rows and part.gap(rows[0][0]) < NEAR * height
        near = [row for row in rows if two_strokes or part.is_in_line(row[-1])]
        if near:
            max(near, key=lambda row: row[-1].right).append(part)
        else:
            rows.append([part])
    for part in parts:
        if part in tall:
            continue
        row = min(rows, key=lambda row: min(part.gap(other) for other in row))
        as_high = MIN_HEIGHT * height < part.height < 2 * height
        is_digit = len(row) > 1 and as_high and part.width < 1.5 * height
        if part in marks or (is_digit and part.is_in_line(min(row, key=part.gap))):
            row.append(part)
    return sorted(rows, key=lambda row: min(part.top for part in row))


# --- Digits of a row --------------------------------------------------------------------------

FINE = 80  # pixels: the height at which digits are cut out
MAX_ZOOM = 16  # the most that the overview is enlarged
ROOM = 0.15  # around a row may be ink that the overview was too coarse to see
MIN_PART = 0.03  # of the heaviest part's ink: smaller parts are specks
SMALL = 0.35  # a lower part joins a digit that is NEAR; alone it is no digit
LOW = 0.6  # a lower part joins a digit that is a CRACK away
CRACK = 0.08
MAX_POINTS = 1500  # of a part are compared


def cut_row(gray: Tensor, paper: Tensor, row: list[Part]) -> list[Tensor]:
    """The digits of a `row` of the overview, from the left: uint8 (28, 28) each.

    They are cut from `gray` (H, W). `paper` (h, w) is that of the overview.
    """
    height = typical_height(row)
    room = max(pixel_width(gray, paper), round(ROOM * height))
    top = max(0, min(part.top for part in row) - room)
    bottom = min(paper.shape[0], max(part.bottom for part in row) + room)
    left = max(0, min(part.left for part in row) - room)
    right = min(paper.shape[1], max(part.right for part in row) + room)
    zoom = min(FINE / height, MAX_ZOOM)
    size = round(zoom * (bottom - top)), round(zoom * (right - left))
    down, across = (of_gray / of_paper for of_gray, of_paper in zip(gray.shape, paper.shape))
    y = slice(round(top * down), round(bottom * down))
    x = slice(round(left * across), round(right * across))
    known = resize(mask_of(row, paper)[top:bottom, left:right].float(), *size).numpy() > 0.5
    depth = ink_depth(resize(gray[y, x], *size), resize(paper[top:bottom, left:right], *size))
    ink = depth / (INK_LEVEL * depth.max())
    parts = [part for part in find_parts(ink, FAINT) if part.ink.max() > 1]
    parts = [part for part in parts if known[part.y, part.x].any()]
    masks = [mask_of([digit], depth) for digit in join_parts(parts)]
    return [prepare(depth, dilate(mask.float(), 3) * (mask | (ink <= FAINT))) for mask in masks]


def join_parts(parts: list[Part]) -> list[Part]:
    """The digits that the `parts` of a row make, from the left: the nearest are joined first."""
    parts = [part for part in parts if part.mass >= MIN_PART * parts[0].mass]
    height = typical_height(parts)
    crack = CRACK * (1 if len(parts) > 2 else 2)  # two parts are more often one digit
    while len(parts) > 1:
        pairs = [(i, j) for j in range(len(parts)) for i in range(j)]
        distances = [distance_beyond(parts[i], parts[j], height, crack) for i, j in pairs]
        distance, (i, j) = min(zip(distances, pairs))
        if distance >= 0:
            break
        b = parts.pop(j)
        a = parts.pop(i)
        parts.append(Part(np.append(a.y, b.y), np.append(a.x, b.x), np.append(a.ink, b.ink)))
    digits = [part for part in parts if part.height >= SMALL * height]
    return sorted(digits, key=lambda part: part.left + part.right)


def distance_beyond(a: Part, b: Part, height: int, crack: float) -> float:
    """How much farther apart the inks are than strokes of one digit, in pixels.

    Below 0 they are one digit. `height` is a digit's, in pixels. `crack` is a share of it.
    """
    shared = min(a.right, b.right) - max(a.left, b.left)
    low = min(a.height, b.height) / height
    if shared > min(a.width, b.width) / 2 or low < SMALL:  # one above the other, or a dash
        near = NEAR * height
    else:
        near = crack * height if low < LOW else 0
    if a.gap(b) >= near:
        return 0
    places = [np.stack([p.y, p.x], 1)[:: len(p.y) // MAX_POINTS + 1] for p in (a, b)]
    return torch.cdist(*(torch.tensor(place).float() for place in places)).min().item() - near


# --- MNIST's form -----------------------------------------------------------------------------

DIGIT_SIZE = 20  # MNIST's digits fit into 20 x 20 of the 28 x 28 pixels
ZOOM = 3  # factor of the size at which a digit is prepared
MIN_STROKE = 2.0  # pixels: thinner pens are thickened; most of MNIST's strokes are 1.6 to 3.6 wide


def prepare(depth: Tensor, place: Tensor) -> Tensor:
    """The digit in `depth` (H, W) where `place` (H, W) is above 0, as in MNIST: uint8 (28, 28)."""
    digit = fit_within(crop(depth * place, place > 0), ZOOM * (DIGIT_SIZE + 4))
    full = digit[digit > 0.4 * digit.max()].quantile(0.6)  # the middle of a stroke
    ink = (2 * digit / full - 0.5).clamp(0, 1)
    ink = crop(ink, ink > 0.5)
    pixel = max(ink.shape) / DIGIT_SIZE
    ink = F.pad(ink, [2 * ZOOM] * 4)
    missing = MIN_STROKE * pixel - 2 * ink.sum().item() / outline(ink)
    ink = dilate(ink, 2 * round(max(missing, 0) / 2) + 1)
    ink = fit_within(crop(ink, ink > 0.5), DIGIT_SIZE)
    height, width = ink.shape
    mass = ink.sum()  # its centre comes to pixel (14, 14)
    top = round(IMAGE_SIZE / 2 - (torch.arange(float(height)) @ ink.sum(1) / mass).item())
    left = round(IMAGE_SIZE / 2 - (torch.arange(float(width)) @ ink.sum(0) / mass).item())
    ink = F.pad(ink, [left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top])
    return (255 * ink / ink.max()).round().byte()


def outline(ink: Tensor) -> float:
    """The length of the edges in `ink` (H, W), 0 to 1, in pixels."""
    return torch.hypot(ink.diff(dim=0)[:, 1:], ink.diff(dim=1)[1:]).sum().item()


# --- Grids ------------------------------------------------------------------------------------


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(H, W) to (height, width): averages to make it smaller, interpolates to make it larger."""
    size = height, width
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]


def fit_within(image: Tensor, side: int) -> Tensor:
    """(H, W) in proportion, the longer side `side` pixels."""
    return resize(image, *(max(1, round(n * side / max(image.shape))) for n in image.shape))


def dilate(image: Tensor, side: int) -> Tensor:
    """The maximum of (H, W) over a square of `side` pixels, an odd number, around each pixel."""
    for _ in range(2):  # columns, then rows: for a large `side` twenty times as fast as max_pool2d
        image = F.pad(image, [side // 2] * 2, value=-math.inf)
        image = image.t().contiguous().unfold(0, side, 1).amax(2)
    return image


def crop(image: Tensor, mask: Tensor) -> Tensor:
    """The smallest rectangle of (H, W) that holds all of `mask` (H, W)."""
    rows = mask.any(1).nonzero()
    columns = mask.any(0).nonzero()
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
