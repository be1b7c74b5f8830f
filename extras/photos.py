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
from model import IMAGE_SIZE
from utils import UserError

with contextlib.suppress(ImportError):  # optional, for the photos of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()

MIN_SIDE, MAX_PIXELS = 8, 64 * 2**20  # smaller and larger images are refused
WORK_SIZE = 512  # pixels a side: larger images are averaged down to this first
DARK = 0.05  # of what is visible of a transparent image: with less of it, the image is a light drawing
OVERVIEW_SIZE = 128  # pixels a side, to find rows: a digit in a row of ten is still ten pixels high
SKEW_SIZE = 32  # pixels a side, to tell ink from paper by its rarity
WINDOW = 2 / 5  # of the shorter side: wider than strokes, narrower than most shadows and sheets
NARROW = 3 / 4  # of a digit's height, once it is known: anything wider is no stroke
POLARITY, USUAL = 3 / 4, 1.0  # weight of stroke likeness against asymmetry; what dark ink, the usual one, has ahead
BORDER = 0.25  # at most, of asymmetry: a tight digit has paper at the border, a sheet on a desk does not
TILE, SOLID = 1 / 4, 0.9  # of the longer side, and of an edge: a smaller or less solid rectangle is no tile
MIN_CONTRAST = 0.03  # of the paper's brightness: fainter marks are paper
INK_LEVEL = 1 / 3  # of the darkest ink's depth: fainter marks are shadow or noise
FAINT = 1 / 2  # of that level: enough for ink that touches ink, so that light strokes do not break
MIN_STEP = 0.4  # of the depth, from pixel to pixel: ink has edges, shadows and folds have at most 0.3
MIN_PIXELS, MAX_PARTS, MAX_POINTS = 4, 60, 1500  # smaller parts, and more, are noise; more pixels are not compared
MIN_PART = 0.03  # of the heaviest part's ink: smaller parts are specks
MIN_FREE = 0.003  # of the heaviest part's ink: a part of this size, away from the border, is the digit
ENCLOSED = 0.05  # of a part's ink: with as much inside, it is a frame; specks in a zero are less
FLAT = 8  # times its own height: a part that is wider, and wider than digits are high, is a ruled line
# Shares of a digit's height:
MIN_HEIGHT, SMALL = 1 / 2, 0.35  # a part lower than the first starts no row; lower than the second, it is no digit
CRACK, LOW, NEAR = 0.08, 0.6, 1 / 2  # a part under LOW joins a digit a CRACK away, one under SMALL a digit NEAR it
ROOM = 0.15  # around a row may be ink that the overview was too coarse to see
FINE, MAX_ZOOM = 80, 16  # pixels: the height at which digits are cut out; the most that the overview is enlarged
DIGIT_SIZE = 20  # MNIST's digits fit into 20 x 20 of the 28 x 28 pixels
ZOOM = 3  # factor of the size at which a digit is prepared
MIN_STROKE = 2.0  # of the 20 pixels: thinner pens are thickened; nine tenths of MNIST's strokes are 1.6 to 3.6 wide
UNSURE = 0.8  # probability of the least sure digit, below which the second guess is told too
HEIF, HEIF_PACKAGE = {".heic", ".heif"}, "pillow-heif"  # the format of iPhones, and the package for it


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths` as given, and the images in its folders, at any depth, sorted. Expands * and ? in names.

    An image has an ending that Pillow reads, and is not hidden. A warning names the other files. A folder without any
    image stands for itself.
    """
    paths = [f for p in paths for f in ([p] if os.path.exists(p) else sorted(map(Path, glob.glob(str(p)))) or [p])]
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
    image, rows = read_rows(path)
    return image, torch.cat(rows)


def read_rows(path: str | Path) -> tuple[Image.Image, list[Tensor]]:
    """As `read_number`, with the digits of each row by themselves, from the top."""
    image = open_image(path)
    channels = torch.from_numpy(np.stack([image.convert("L"), *image.split()]).astype(np.float32) / 255)
    rows = next(filter(None, map(find_digits, channels)), [])  # red ink on green paper may be blank in grey
    if not rows:
        raise UserError(f"{path}: blank, no ink found")
    return image, rows


def open_image(path: str | Path) -> Image.Image:
    """The image as people see it: upright, without transparency, RGB. UserError if it cannot be read."""
    if os.path.isdir(path):
        raise UserError(f"{path}: no images in this folder")
    try:
        with warnings.catch_warnings(record=True), Image.open(path) as image:  # Pillow warns of large and odd files
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ValueError(f"{width} x {height} pixels are too few, {MIN_SIDE} a side are needed")
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            image.draft(None, (WORK_SIZE, WORK_SIZE))  # a large JPEG is decoded at a half, a quarter or an eighth
            if image.format == "GIF":
                image.seek(image.n_frames - 1)  # a digit that draws itself is complete in the last frame
            image.load()
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or utils.one_line(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            lacks = Path(path).suffix.lower() in HEIF and not HEIF & set(Image.registered_extensions())
            needs = f"needs the package {HEIF_PACKAGE}: pip install {HEIF_PACKAGE}"
            reason = needs if lacks else "no image Pillow can read"
        raise UserError(f"{path}: {reason}") from error
    if image.mode[0] in "IF":
        values = np.asarray(ImageOps.exif_transpose(image), np.float32)  # 16 bits or floating point, to be stretched
        image = Image.fromarray(np.uint8((values - values.min()) * (255 / max(np.ptp(values), 1e-6))))
    elif image.mode not in ("L", "RGB") or image.has_transparency_data:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = ImageOps.exif_transpose(image.reduce(math.ceil(max(image.size) / WORK_SIZE)))
    return (on_backdrop(image) if image.mode == "RGBA" else image).convert("RGB")


def on_backdrop(image: Image.Image) -> Image.Image:
    """RGBA on white, or on black if all of its visible part is light, but for an edge."""
    gray, visible = image.convert("L"), image.getchannel("A").point(lambda alpha: alpha > 127 and 255)
    dark = ImageStat.Stat(gray.point(lambda value: value < 128 and 255), visible)
    backdrop = Image.new("RGBA", image.size, "white" if dark.sum[0] > 255 * DARK * dark.count[0] else "black")
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


class Part:
    """Ink that hangs together: its depth `ink` (n,) at the places `y` and `x` (n,), and the box around it."""

    def __init__(self, y: np.ndarray, x: np.ndarray, ink: np.ndarray) -> None:
        self.y, self.x, self.ink, self.mass = y, x, ink, float(ink.sum())
        self.top, self.bottom, self.left, self.right = int(y.min()), int(y.max()) + 1, int(x.min()), int(x.max()) + 1
        self.height, self.width = self.bottom - self.top, self.right - self.left

    def gap(self, other: Part) -> int:
        """How far apart the boxes are, along the row or across it, whichever is more; 0 where they meet."""
        along = max(self.left, other.left) - min(self.right, other.right)
        return max(along, max(self.top, other.top) - min(self.bottom, other.bottom), 0)

    def is_inside(self, other: Part) -> bool:
        """Whether the box of `other` surrounds this one's."""
        is_between = other.left < self.left and self.right < other.right
        return is_between and other.top < self.top and self.bottom < other.bottom

    def is_in_line(self, other: Part) -> bool:
        """Whether more than half of the height of the less high one is beside the other."""
        return min(self.bottom, other.bottom) - max(self.top, other.top) > min(self.height, other.height) / 2


def find_digits(gray: Tensor) -> list[Tensor]:
    """The digits in brightness (H, W), 0 to 1, as in MNIST: uint8 (N, 28, 28) for each row from the top.

    The ink is dark or light: what looks more like strokes, is rarer and is not at the border. Rows are found in an
    overview twice. The second time the height of the digits is known, and paper is what is wider than their strokes.
    """
    small = fit_within(gray, OVERVIEW_SIZE)
    if tile := find_tile(small):
        top, bottom, left, right = (round(n * max(gray.shape) / OVERVIEW_SIZE) for n in tile)
        if rows := find_digits(gray[top:bottom, left:right]):
            return rows
    pixel, window = math.ceil(OVERVIEW_SIZE / max(gray.shape)), int(WINDOW * min(small.shape))
    dark, light = ([p for row in find_rows(x, window, pixel, 1)[0] for p in row] for x in (small, 1 - small))
    likeness = USUAL + stroke_likeness(dark) - stroke_likeness(light)
    if not dark or (light and asymmetry(small) > POLARITY * likeness):
        gray, small, dark = 1 - gray, 1 - small, light
    window = min(window, int(NARROW * typical_height(dark)))
    rows, paper = find_rows(small, window, pixel, FAINT)
    return [torch.stack(digits) for digits in (cut_row(gray, paper, row) for row in rows) if digits]


def find_tile(gray: Tensor) -> tuple[int, int, int, int] | None:
    """The inside (top, bottom, left, right) of a solid rectangle in (H, W), darker or lighter than what is around."""
    flat = gray - (gray.min() + gray.max()) / 2
    for part in find_parts(flat, 0) + find_parts(-flat, 0):
        (height, width), sides = gray.shape, (part.height, part.width)
        if min(sides) > TILE * max(height, width) and part.height < height and part.width < width:
            rows, columns = np.bincount(part.y - part.top), np.bincount(part.x - part.left)
            solid = min(rows[2], rows[-3]) > SOLID * part.width and min(columns[2], columns[-3]) > SOLID * part.height
            if solid and len(part.y) > part.height * part.width / 2:
                return part.top + 3, part.bottom - 3, part.left + 3, part.right - 3
    return None


def find_parts(depth: Tensor, level: float) -> list[Part]:
    """The connected parts, also by corners, of what is deeper than `level` in (H, W), the heaviest first.

    Each pixel starts with its own number. Pixels that touch take the smaller of their numbers, until none differ.
    """
    mask = F.pad(depth > level, [1] * 4).numpy()
    numbers = np.cumsum(mask).reshape(mask.shape) * mask
    here, others = numbers[:-1, 1:-1], (numbers[:-1, 2:], numbers[1:, :-2], numbers[1:, 1:-1], numbers[1:, 2:])
    a, b = np.concatenate([(here[both], there[both]) for there in others for both in [(here > 0) & (there > 0)]], 1)
    number = np.arange(mask.sum() + 1)
    while len(a):
        np.minimum.at(number, np.maximum(a, b), np.minimum(a, b))
        while (number != number[number]).any():
            number = number[number]
        a, b = number[np.stack([a, b])][:, number[a] != number[b]]
    y, x = mask.nonzero()
    order = np.argsort(number[1:], kind="stable")
    pieces = np.split(order, np.flatnonzero(np.diff(number[1:][order])) + 1)
    parts = [Part(y[p] - 1, x[p] - 1, depth.numpy()[y[p] - 1, x[p] - 1]) for p in pieces if len(p) >= MIN_PIXELS]
    return sorted(parts, key=lambda part: -part.mass)[:MAX_PARTS]


def find_rows(gray: Tensor, window: int, pixel: int, faint: float) -> tuple[list[list[Part]], Tensor]:
    """The dark ink of (H, W) that may be digits, as rows from the top, and the paper (H, W).

    Marks narrower than `window` pixels are ink. A pixel of the image is `pixel` pixels wide here. Ink that touches ink
    need be only `faint` times as dark.
    """
    side, width = window // 2 * 2 + 1, 2 * pixel + 1
    paper = -dilate(-dilate(gray, side), side)  # a closing: without the dark marks that are narrower
    depth = ink_depth(gray, paper)
    step = dilate(depth, width) + dilate(-depth, width)
    image = Part(*(np.array([0, n - 1]) for n in gray.shape), np.zeros(2))  # its box is that of the image
    free = [part for part in find_parts(depth, INK_LEVEL * depth.max()) if part.is_inside(image)]
    level = max(INK_LEVEL * (free[0].ink if free else depth).max().item(), MIN_CONTRAST)
    parts = [part for part in find_parts(depth, faint * level) if part.ink.max() > level]
    parts = [part for part in parts if np.quantile(step[part.y, part.x], 0.9) > MIN_STEP * part.ink.max()]
    free = [part for part in parts if part.is_inside(image)]
    core = free if free and free[0].mass > MIN_FREE * parts[0].mass else parts
    inside = [sum(other.mass for other in core if other.is_inside(part)) for part in core]
    core = [part for part, mass in zip(core, inside) if mass <= ENCLOSED * part.mass]  # no frames
    return rows_of(core, parts) if core else [], paper


def typical_height(parts: list[Part]) -> int:
    """The height that half of the ink does not exceed; 0 without ink."""
    return int(np.median(np.repeat([part.height for part in parts], [len(part.y) for part in parts]))) if parts else 0


def rows_of(core: list[Part], parts: list[Part]) -> list[list[Part]]:
    """Rows from the top, of the `core` and of those other `parts` that stand in line with it."""
    height = typical_height(core)
    core = [part for part in core if part.width <= max(FLAT * part.height, height)] or core
    height = typical_height(core)
    rows: list[list[Part]] = []
    tall = [part for part in core if part.height >= MIN_HEIGHT * height]
    for part in sorted(tall, key=lambda part: part.left):
        near = [r for r in rows if part.is_in_line(r[-1]) or (len(tall) == 2 and part.gap(r[-1]) < NEAR * height)]
        max(near, key=lambda row: row[-1].right).append(part) if near else rows.append([part])
    for part in (part for part in parts if part not in tall):
        row = min(rows, key=lambda row: min(map(part.gap, row)))
        is_digit = len(row) > 1 and MIN_HEIGHT * height < part.height < 2 * height and part.width < 1.5 * height
        if part in core or (is_digit and part.is_in_line(min(row, key=part.gap))):
            row.append(part)
    return sorted(rows, key=lambda row: min(part.top for part in row))


def cut_row(gray: Tensor, paper: Tensor, row: list[Part]) -> list[Tensor]:
    """The digits of a `row` of the overview `paper` (h, w), cut from `gray` (H, W), from the left: uint8 (28, 28)."""
    height, pixel = typical_height(row), math.ceil(len(paper) / len(gray))
    room, zoom = max(pixel, round(ROOM * height)), min(FINE / height, MAX_ZOOM)
    top, bottom = max(0, min(p.top for p in row) - room), min(len(paper), max(p.bottom for p in row) + room)
    left, right = max(0, min(p.left for p in row) - room), min(paper.shape[1], max(p.right for p in row) + room)
    size = round(zoom * (bottom - top)), round(zoom * (right - left))
    down, across = (a / b for a, b in zip(gray.shape, paper.shape))
    area = gray[round(top * down) : round(bottom * down), round(left * across) : round(right * across)]
    known = resize(mask_of(row, paper)[top:bottom, left:right].float(), *size).numpy() > 0.5
    depth = ink_depth(resize(area, *size), resize(paper[top:bottom, left:right], *size))
    ink = depth / (INK_LEVEL * depth.max())
    parts = [part for part in find_parts(ink, FAINT) if part.ink.max() > 1 and known[part.y, part.x].any()]
    masks = [mask_of([digit], depth) for digit in digits_of(parts)]
    return [prepare(depth, dilate(mask.float(), 3) * (mask | (ink <= FAINT))) for mask in masks]


def digits_of(parts: list[Part]) -> list[Part]:
    """The digits that the `parts` of a row make, from the left: the nearest are joined first."""
    parts = [part for part in parts if part.mass >= MIN_PART * parts[0].mass]
    height = typical_height(parts)
    crack = CRACK * (1 if len(parts) > 2 else 2)  # two parts are more often one digit

    def beyond(a: Part, b: Part) -> float:
        """How much farther apart the inks are than strokes of one digit, in pixels; 0 or more for two digits."""
        is_upon = min(a.right, b.right) - max(a.left, b.left) > min(a.width, b.width) / 2
        low = min(a.height, b.height) / height
        near = height * (NEAR if is_upon or low < SMALL else crack if low < LOW else 0)
        places = (torch.tensor(np.stack([p.y, p.x], 1)[:: len(p.y) // MAX_POINTS + 1]).float() for p in (a, b))
        return torch.cdist(*places).min().item() - near if a.gap(b) < near else 0

    while len(parts) > 1:
        distance, i, j = min((beyond(a, b), i, j) for j, b in enumerate(parts) for i, a in enumerate(parts[:j]))
        if distance >= 0:
            break
        b, a = parts.pop(j), parts.pop(i)
        parts.append(Part(np.append(a.y, b.y), np.append(a.x, b.x), np.append(a.ink, b.ink)))
    return sorted((p for p in parts if p.height >= SMALL * height), key=lambda part: part.left + part.right)


def mask_of(parts: list[Part], like: Tensor) -> Tensor:
    """Where `parts` are: bool of the size of `like` (H, W)."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for part in parts:
        mask[part.y, part.x] = True
    return mask


def stroke_likeness(parts: list[Part]) -> float:
    """Logarithm of a part's mean area / width², where the width of a stroke is 2 area / perimeter; 0 without ink."""
    mask = mask_of(parts, torch.empty(OVERVIEW_SIZE, OVERVIEW_SIZE)).float()
    return math.log(outline(mask) ** 2 / 4 / mask.sum().item() / len(parts)) if parts else 0.0


def asymmetry(gray: Tensor) -> float:
    """How much (H, W) looks like light ink on dark: ink is rare, which skews the histogram, and not at the border."""
    gray = fit_within(gray, SKEW_SIZE)
    flat = gray - resize(resize(gray, 3, 3), *gray.shape)  # without uneven light
    flat = (flat - flat.mean()) / flat.std().clamp(min=1e-6)
    border = torch.cat([flat[0], flat[-1], flat[:, 0], flat[:, -1]]).mean()
    return ((flat**3).mean() - border.clamp(-BORDER, BORDER)).item()


def outline(ink: Tensor) -> float:
    """The length of the edges in `ink` (H, W), 0 to 1, in pixels."""
    return torch.hypot(ink.diff(dim=0)[:, 1:], ink.diff(dim=1)[1:]).sum().item()


def ink_depth(gray: Tensor, paper: Tensor) -> Tensor:
    """The share of the paper's light that the ink takes, 0 to 1: (H, W)."""
    return ((paper - gray) / paper.clamp(min=0.05)).clamp(min=0)


def prepare(depth: Tensor, place: Tensor) -> Tensor:
    """The digit in `depth` (H, W) where `place` (H, W) is above 0, as in MNIST: uint8 (28, 28)."""
    digit = fit_within(crop(depth * place, place > 0), ZOOM * (DIGIT_SIZE + 4))
    full = digit[digit > 0.4 * digit.max()].quantile(0.6)  # the middle of a stroke
    ink = (2 * digit / full - 0.5).clamp(0, 1)
    ink = crop(ink, ink > 0.5)
    pixel, ink = max(ink.shape) / DIGIT_SIZE, F.pad(ink, [2 * ZOOM] * 4)
    missing = MIN_STROKE * pixel - 2 * ink.sum().item() / outline(ink)
    ink = dilate(ink, 2 * round(max(missing, 0) / 2) + 1)
    ink = fit_within(crop(ink, ink > 0.5), DIGIT_SIZE)
    (height, width), mass = ink.shape, ink.sum()  # the centre of mass comes to pixel (14, 14)
    top = round(IMAGE_SIZE / 2 - (torch.arange(float(height)) @ ink.sum(1) / mass).item())
    left = round(IMAGE_SIZE / 2 - (torch.arange(float(width)) @ ink.sum(0) / mass).item())
    ink = F.pad(ink, [left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top])
    return (255 * ink / ink.max()).round().byte()


def classify(model: nn.Module, digits: Tensor) -> Tensor:
    """Probabilities float (N, 10), on the CPU, of prepared digits uint8 (N, 28, 28), of nine looks where unsure."""
    device = next(model.parameters()).device
    return utils.predict(model, digits.unsqueeze(1).to(device), tta=True).softmax(1).cpu()


def read_files(model: nn.Module, files: Sequence[Path]) -> Iterator[tuple[Image.Image, Tensor, dict[str, Any]]]:
    """Each of `files`: the image, its digits, and the report. A file that cannot be read is a warning, and left out."""
    for path in (bar := tqdm(files, "Reading", leave=False, delay=2, disable=None)):
        try:
            image, rows = read_rows(path)
        except UserError as error:
            bar.clear()
            utils.say("warning", str(error))
        else:
            digits = torch.cat(rows)
            yield image, digits, describe(path, classify(model, digits), list(map(len, rows)))


def describe(path: Path, probabilities: Tensor, rows: Sequence[int]) -> dict[str, Any]:
    """The report on one image whose digits have `probabilities` (N, 10), with so many in each of its `rows`."""
    confidences, digits = probabilities.max(1)
    number, doubt = digits_to_text(digits, rows), second_guess(probabilities, rows)
    each = [
        {"digit": int(p.argmax()), "confidence": p.max().item(), "probabilities": p.tolist()} for p in probabilities
    ]
    described = {"path": str(path), "number": number, "confidence": confidences.min().item(), "digits": each}
    return {**described, **({"second_guess": doubt} if doubt else {})}


def second_guess(probabilities: Tensor, rows: Sequence[int] = ()) -> str | None:
    """The number with the second guess for the least sure digit of (N, 10), if that is below UNSURE."""
    confidences, digits = probabilities.max(1)
    least = int(confidences.argmin())
    digits[least] = probabilities[least].topk(2).indices[1]
    return digits_to_text(digits, rows) if confidences[least] < UNSURE else None


def digits_to_text(digits: Tensor, rows: Sequence[int] = ()) -> str:
    """Digits (N,) as a string, with a blank between `rows` of so many."""
    return " ".join("".join(map(str, row.tolist())) for row in digits.split(list(rows) or len(digits)))
