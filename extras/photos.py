"""Your own digits: photos and scans, prepared as MNIST's images were (LeCun et al., 1998).

`gray` is brightness, `depth` the share of the paper's light that ink takes: float (H, W), 0 to 1.
A "part" is ink that hangs together: a connected component.
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
from PIL import Image, ImageOps, ImageSequence, ImageStat, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

import utils
from model import CLASS_NAMES, IMAGE_SIZE
from utils import UserError

with contextlib.suppress(ImportError):  # optional, for the photos of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()


# --- Reports ---

MORE = "perhaps more digits"
UNSURE = 0.8  # probability of the least sure digit, below which the second guess is told too


def read_images(
    model: nn.Module, paths: Sequence[Path], labels: bool = False, raw: bool = False
) -> tuple[dict[str, Any], int]:
    """All that is reported of the images in `paths`, ready for JSON, and how many were not read.

    With `labels` the name of an image's folder is the right answer, and the accuracy, 0 to 1, is
    reported too. UserError for a folder that is named after neither a number nor a class.
    """
    files = find_images(paths)
    if labels:
        for folder in {file.absolute().parent for file in files if os.path.isfile(file)}:
            if folder.name not in CLASS_NAMES and not folder.name.replace(" ", "").isdecimal():
                raise UserError(f"--labels: {folder} is named after no number")
    images = [report for _, _, report in read_files(model, files, raw)]
    results: dict[str, Any] = {"images": images}
    if labels and images:
        for image in images:
            image["label"] = Path(image["path"]).absolute().parent.name
        # Rows do not matter: a folder 4715 is right for 47 above 15.
        answers = [(image["number"], image["label"]) for image in images]
        right = sum(a.replace(" ", "") == b.replace(" ", "") for a, b in answers)
        results.update(accuracy=right / len(images), right=right, labelled=len(images))
    return results, len(files) - len(images)


def read_files(
    model: nn.Module, files: Sequence[Path], raw: bool = False
) -> Iterator[tuple[Image.Image, Tensor, dict[str, Any]]]:
    """Each of `files`: the image, its digits uint8 (N, 28, 28), and the report.

    A file that cannot be read is a warning, and left out.
    """
    for path in (bar := tqdm(files, "Reading", leave=False, delay=2, disable=None)):
        try:
            if raw:
                image, digits = read_raw(path)
                row_lengths, is_doubtful = [1], False
            else:
                image, digits, row_lengths, is_doubtful = read_rows(path)
        except UserError as error:
            bar.clear()
            utils.say("warning", str(error))
            continue
        report = describe(path, classify(model, digits, tta=not raw), row_lengths)
        if is_doubtful:
            report["doubt"] = MORE
        yield image, digits, report


def classify(model: nn.Module, digits: Tensor, tta: bool = True) -> Tensor:
    """Probabilities float (N, 10), on the CPU, of prepared digits uint8 (N, 28, 28)."""
    device = next(model.parameters()).device
    return utils.predict(model, digits.unsqueeze(1).to(device), tta).softmax(1).cpu()


def describe(path: Path, probabilities: Tensor, row_lengths: list[int]) -> dict[str, Any]:
    """The report on one image: `probabilities` (N, 10) of its digits, `row_lengths` per row."""
    confidences, digits = probabilities.max(1)
    least = int(confidences.argmin())
    each = zip(digits.tolist(), confidences.tolist(), probabilities.tolist())
    report = {
        "path": str(path),
        "number": digits_to_text(digits, row_lengths),
        "confidence": confidences[least].item(),
        "digits": [{"digit": d, "confidence": c, "probabilities": p} for d, c, p in each],
    }
    if confidences[least] < UNSURE:
        digits[least] = probabilities[least].topk(2).indices[1]
        report["second_guess"] = digits_to_text(digits, row_lengths)
    return report


def digits_to_text(digits: Tensor, row_lengths: list[int]) -> str:
    """Digits (N,) as a string, with a blank between rows of `row_lengths`."""
    rows = digits.split(row_lengths)
    return " ".join("".join(CLASS_NAMES[digit] for digit in row) for row in rows)


# --- Files ---

MIN_SIDE = 8  # pixels: smaller images are refused
MAX_PIXELS = 64 * 2**20  # larger images are refused
WORK_SIZE = 512  # pixels a side: larger images are averaged down to this first
STRIP = 4  # times as long as wide, or more: a strip, which stays larger
FRAMES = {"GIF", "PNG", "WEBP", "AVIF"}  # formats with animations


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths`, with * and ? expanded, and the images in its folders, at any depth.

    An image has an ending that Pillow reads. A warning tells the other endings. Names that begin
    with . are left out. A folder without any image is kept, for an error later.
    """
    readable = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    skipped = []
    for pattern in paths:
        is_name = os.path.exists(pattern)  # which may hold a * or [
        matches = [] if is_name else sorted(map(Path, glob.glob(str(pattern))))
        for path in matches or [pattern]:
            below = glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True)
            files = [file for file in sorted(map(Path, below)) if os.path.isfile(file)]
            images = [file for file in files if file.suffix.lower() in readable]
            found += images or [path]
            endings = [file.suffix.lower() for file in files]
            skipped += [ending or "no ending" for ending in endings if ending not in readable]
    if skipped:
        kinds = ", ".join(sorted(set(skipped)))
        needs = " (.heic needs pip install pillow-heif)" if ".heic" in skipped else ""
        utils.say("warning", f"{len(skipped)} files skipped: {kinds}{needs}")
    return found


def read_number(path: str | Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB, and its digits as MNIST has them: uint8 (N, 28, 28), ink 255.

    UserError, one line naming the file, if it cannot be read or is blank.
    """
    return read_rows(path)[:2]


def read_raw(path: str | Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB, and as the network sees it, ink 255: uint8 (1, 28, 28).

    UserError, one line naming the file, if it has another size.
    """
    image, _ = open_image(path)
    width, height = image.size
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f"{path}: {width} x {height} pixels; --raw needs {IMAGE_SIZE} a side")
    return image, torch.from_numpy(np.array(image.convert("L")))[None]


def read_rows(path: str | Path) -> tuple[Image.Image, Tensor, list[int], bool]:
    """The image and its digits, the number of digits in each row, and whether there may be more."""
    image, alpha = open_image(path)
    # Red on green may vanish in grey; white chalk on transparency, once we put white below.
    for channel in (image.convert("L"), *image.split(), alpha):
        gray = torch.from_numpy(np.asarray(channel, np.float32) / 255)
        gray = erase_lines(gray)  # across
        gray = erase_lines(gray.t()).t()  # and down
        rows, is_doubtful = find_digits(gray.contiguous())
        if rows:
            return image, torch.cat(rows), [len(row) for row in rows], is_doubtful
    raise UserError(f"{path}: blank, no ink found")


def open_image(path: str | Path) -> tuple[Image.Image, Image.Image]:
    """The image as people see it, upright, on white, RGB, about 512 pixels a side; its alpha."""
    image = load_image(path)
    if image.mode[0] in "IF":  # 16 bits or floating point, to be stretched
        values = np.asarray(image, np.float32)
        values = (values - values.min()) * (255 / max(np.ptp(values), 1e-6))
        image = Image.fromarray(np.uint8(values))
    elif image.mode not in ("L", "RGB") or image.has_transparency_data:
        image = image.convert("RGBA")
    image = image.reduce(math.ceil(scale_side(image.size) / WORK_SIZE)).convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    return paper.convert("RGB"), image.getchannel("A")


def scale_side(size: Sequence[int]) -> int:
    """The side that scaling goes by: the longer, at most STRIP times the shorter."""
    return min(max(size), STRIP * min(size))


def load_image(path: str | Path) -> Image.Image:
    """The image at `path`, upright; UserError, one line naming the file, if it cannot be read."""
    if os.path.isdir(path):
        raise UserError(f"{path}: no images in this folder")
    try:
        with warnings.catch_warnings(record=True), Image.open(path) as image:
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ValueError(f"{width} x {height} pixels are too few")
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            image.draft(None, (WORK_SIZE, WORK_SIZE))  # decodes a large JPEG at a half or less
            count = getattr(image, "n_frames", 1)
            if image.format == "TIFF" and count > 1:
                utils.say("warning", f"{path}: only the first of {count} pages is read")
            if image.format in FRAMES and count > 1:
                frames = (frame.convert("RGBA") for frame in ImageSequence.Iterator(image))
                # The one with most ink: its colours and alpha vary most.
                image = max(frames, key=lambda frame: sum(ImageStat.Stat(frame).stddev))
            ImageOps.exif_transpose(image, in_place=True)  # loads it, too
            return image
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or utils.one_line(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no image Pillow can read (.heic needs pip install pillow-heif)"
        raise UserError(f"{path}: {reason}") from error


# --- From an image to rows of parts ---

OVERVIEW_SIZE = 128  # pixels a side: a digit in a row of ten is still ten pixels tall
WINDOW = 2 / 5  # of the shorter side: narrower marks are ink
WIDE = 1.5  # times its height: a wider digit is perhaps two that touch
NARROW = 3 / 4  # of a digit's height, once it is known: anything wider is no stroke


def find_digits(gray: Tensor) -> tuple[list[Tensor], bool]:
    """The digits of each row in `gray`, uint8 (N, 28, 28), and whether there are perhaps more.

    Rows are found twice in an overview: with WINDOW, then with NARROW, once the height is known.
    """
    size = OVERVIEW_SIZE * max(gray.shape) // scale_side(gray.shape)
    overview = fit_within(gray, size)
    tile = find_tile(overview)
    if tile:
        top, bottom, left, right = (round(n * max(gray.shape) / size) for n in tile)
        found = find_digits(gray[top:bottom, left:right])
        if found[0]:
            return found
    if asymmetry(overview) > LIGHT:
        gray = 1 - gray
        overview = 1 - overview
    pixel = math.ceil(size / max(gray.shape))
    window = int(WINDOW * min(overview.shape))
    rows, _ = find_rows(ink_depth(overview, find_paper(overview, window)), pixel)
    height = typical_height([part for row in rows for part in row])
    paper = find_paper(overview, min(window, int(NARROW * height)))
    rows, others = find_rows(ink_depth(overview, paper), pixel)
    digits = [cut_row(gray, paper, row) for row in rows]
    is_doubtful = any(could_be_digit(part, row) for part in others for row in rows)
    is_doubtful |= any(is_wide(digit) for row in digits for digit in row)
    return [torch.stack(row) for row in digits if row], is_doubtful


def is_wide(digit: Tensor) -> bool:
    """Whether a prepared `digit` (28, 28) is perhaps two that touch."""
    ink = digit > 127
    return bool(ink.any(0).sum() > WIDE * ink.any(1).sum())


def find_paper(gray: Tensor, window: int) -> Tensor:
    """`gray` without the dark marks that are narrower than `window` pixels: a closing."""
    side = window // 2 * 2 + 1
    return -dilate(-dilate(gray, side), side)


def ink_depth(gray: Tensor, paper: Tensor) -> Tensor:
    """The share of the light of `paper` (H, W) that the ink in `gray` (H, W) takes: (H, W)."""
    return ((paper - gray) / paper.clamp(min=0.05)).clamp(min=0)


# --- Lines of ruled and squared paper ---

THIN = 1 / 48  # of a line's length: a printed line is thinner, a pen's stroke hardly ever
SLOPE = 0.12  # at most: paper in a photo lies up to 7 degrees askew
SLOPES = 21  # are tried, from -SLOPE to SLOPE
BLOCKS = 24  # of columns: in each the line stays in one row
GAPS = 0.3  # of the blocks, the palest, do not count: a line may be faded or hidden
LINE = 0.03  # deeper than the median of all places: a paler line does no harm
OPEN_END = 1 / 2  # of the line's depth: with less at either end, it is a stroke
DEEPER = 3  # times the line's depth: that is ink which crosses it, and it stays


def erase_lines(gray: Tensor) -> Tensor:
    """`gray` (H, W) without the dark lines that cross it from the left border to the right.

    A line is thin, straight and about as deep everywhere. Ink that crosses it is deeper, or is not
    thin where it crosses.
    """
    height, width = gray.shape
    side = 2 * round(THIN * width / 2) + 1
    padded = F.pad(gray, [0, 0, side, side])  # black above and below: a dark edge is not thin
    paper = -dilate_along_y(-dilate_along_y(padded, side), side)[side:-side]
    depth = (paper - gray) / paper.clamp(min=0.2)  # of marks that are thin along y
    thin = dilate_along_y(depth, 3)[::2]  # every second row: y is halved from here on
    blocks = F.adaptive_avg_pool1d(thin, BLOCKS)
    middles = (torch.arange(BLOCKS) + 0.5) * width / BLOCKS - width / 2
    rise = (torch.linspace(-SLOPE, SLOPE, SLOPES)[:, None] * middles / 2).round().long()
    room = int(rise.max())
    blocks = F.pad(blocks, [0, 0, room, room], value=math.inf)  # a gap, but no OPEN_END
    first_rows = torch.arange(room, len(blocks) - room)
    places = (first_rows[:, None, None] + rise).flatten(0, 1)  # a line's row in each block: (N, 24)
    depths = blocks.gather(0, places).nan_to_num(posinf=0).kthvalue(1 + int(GAPS * BLOCKS)).values
    nearby = dilate_along_y(blocks, 5).gather(0, places)  # paper bends at its edges
    ends = torch.minimum(nearby[:, :2].amax(1), nearby[:, -2:].amax(1))
    is_line = (depths > depths.median() + LINE) & (ends > OPEN_END * depths)
    found = torch.where(is_line, depths, 0.0)[:, None].expand(places.shape)
    lines = torch.zeros_like(blocks).scatter_reduce(0, places, found, "amax")
    lines = dilate_along_y(lines, 3)[room : len(blocks) - room]
    lines = lines[torch.arange(height) // 2][:, torch.arange(width) * BLOCKS // width]
    # Erases marks up to DEEPER / 2 times as deep as the line, and none from DEEPER on.
    return gray + paper * torch.minimum(depth, (DEEPER * lines - depth).clamp(min=0))


# --- Whether ink is dark or light, and tiles ---

SKEW_SIZE = 32  # pixels a side: the rarer here, light or dark, is ink
LIGHT = 0.9  # asymmetry above which ink is light; a photo's shadows have some, too
BORDER = 0.25  # what the border counts at most: it may be paper, or a desk around a sheet
TILE = 1 / 4  # of the longer side: a smaller rectangle is no tile
SOLID = 0.9  # of an edge: what is less complete is no tile


def asymmetry(gray: Tensor) -> float:
    """Skewness less the border's mean: high where light is rare and not at the border, as ink."""
    gray = fit_within(gray, SKEW_SIZE)
    flat = gray - resize(resize(gray, 3, 3), *gray.shape)  # without uneven light
    flat = (flat - flat.mean()) / flat.std().clamp(min=1e-6)
    border = torch.cat([flat[0], flat[-1], flat[:, 0], flat[:, -1]]).mean()
    return ((flat**3).mean() - border.clamp(-BORDER, BORDER)).item()


def find_tile(gray: Tensor) -> tuple[int, int, int, int] | None:
    """The inside of a tile, a solid rectangle around digits: top, bottom, left, right."""
    level = (gray.min() + gray.max()) / 2
    for part in find_parts(gray - level, 0) + find_parts(level - gray, 0):
        is_large = min(part.height, part.width) > TILE * max(gray.shape)
        if is_large and part.height < gray.shape[0] and part.width < gray.shape[1]:
            mask = mask_of([part], gray)[part.top : part.bottom, part.left : part.right].float()
            edges = mask[2], mask[-3], mask[:, 2], mask[:, -3]
            if mask.mean() > 1 / 2 and min(edge.mean() for edge in edges) > SOLID:
                return part.top + 3, part.bottom - 3, part.left + 3, part.right - 3
    return None


# --- Parts ---

MIN_PIXELS = 4  # smaller parts are noise
MAX_PARTS = 200  # the heaviest; the rest is noise


class Part:
    """Ink that hangs together: its depth `ink` (n,) at `y` and `x` (n,), and the box around it."""

    def __init__(self, y: np.ndarray, x: np.ndarray, ink: np.ndarray) -> None:
        self.y = y
        self.x = x
        self.ink = ink
        self.mass = float(ink.sum())
        self.top, self.bottom = int(y.min()), int(y.max()) + 1
        self.left, self.right = int(x.min()), int(x.max()) + 1
        self.height = self.bottom - self.top
        self.width = self.right - self.left

    def gap(self, other: Part) -> int:
        """How far apart the boxes are, along x or y, whichever is more; 0 where they meet."""
        gap_x = max(self.left, other.left) - min(self.right, other.right)
        gap_y = max(self.top, other.top) - min(self.bottom, other.bottom)
        return max(gap_x, gap_y, 0)

    def is_inside(self, other: Part) -> bool:
        """Whether the box of `other` surrounds this one's."""
        is_between = other.left < self.left and self.right < other.right
        return is_between and other.top < self.top and self.bottom < other.bottom

    def is_off_border(self, image: Tensor) -> bool:
        """Whether this part does not touch the border of `image` (H, W)."""
        height, width = image.shape
        return self.top > 0 and self.left > 0 and self.bottom < height and self.right < width

    def is_cut(self, image: Tensor) -> bool:
        """Whether half of its height is at the left or right border of `image`: a fingertip."""
        at_border = np.isin(self.x, (0, image.shape[1] - 1)).sum()
        return bool(at_border > self.height / 2)

    def is_in_line(self, other: Part) -> bool:
        """Whether the two share more than half of the shorter one's height."""
        shared = min(self.bottom, other.bottom) - max(self.top, other.top)
        return shared > min(self.height, other.height) / 2


def find_parts(depth: Tensor, level: float) -> list[Part]:
    """The parts of what is deeper than `level` in `depth` (H, W), the heaviest first.

    Each pixel starts with its own number. Pixels that touch, also by corners, take the smaller of
    their numbers, until none differ.
    """
    mask = F.pad(depth > level, [1] * 4).numpy()
    numbers = np.cumsum(mask).reshape(mask.shape) * mask
    here = numbers[:-1, 1:-1]
    neighbours = numbers[:-1, 2:], numbers[1:, :-2], numbers[1:, 1:-1], numbers[1:, 2:]
    pairs = [np.stack([here, there])[:, (here > 0) & (there > 0)] for there in neighbours]
    a, b = np.concatenate(pairs, 1)
    root = np.arange(mask.sum() + 1)  # of each number; from 1 on in the order of y, x below
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root != root[root]).any():
            root = root[root]
        differ = root[a] != root[b]
        a, b = root[a[differ]], root[b[differ]]
    y, x = (places - 1 for places in mask.nonzero())
    ink = depth.numpy()[y, x]
    _, sizes = np.unique(root[1:], return_counts=True)
    pieces = np.split(np.argsort(root[1:], kind="stable"), sizes.cumsum()[:-1])
    parts = [Part(y[p], x[p], ink[p]) for p in pieces if len(p) >= MIN_PIXELS]
    return sorted(parts, key=lambda part: -part.mass)[:MAX_PARTS]


def mask_of(parts: list[Part], like: Tensor) -> Tensor:
    """Where `parts` are: bool of the size of `like` (H, W)."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for part in parts:
        mask[part.y, part.x] = True
    return mask


def typical_height(parts: list[Part]) -> int:
    """The median height, each part counted by its pixels; 0 without parts."""
    if not parts:
        return 0
    pixels = [len(part.y) for part in parts]
    return int(np.median(np.repeat([part.height for part in parts], pixels)))


# --- Rows ---

MIN_CONTRAST = 0.03  # of the paper's brightness: fainter marks are paper
INK_LEVEL = 1 / 3  # of the darkest ink's depth: fainter marks are shadow or noise
FAINT = 1 / 2  # of that level: enough beside such ink (hysteresis), so that strokes do not break
MIN_STEP = 0.4  # of the depth, from pixel to pixel: ink has sharp edges; shadows reach 0.3
ENCLOSED = 0.05  # of a part's ink: with as much inside, it is a frame; specks in a zero are less
FLAT = 8  # times its own height, and a digit's height: a part wider than both is a line
MIN_HEIGHT = 1 / 2  # of a digit's height: a shorter part starts no row
MAX_HEIGHT = 2  # of it: a taller part is no digit of the row
FRAME = 1.2  # of it: what surrounds digits and is taller is a frame


def find_rows(depth: Tensor, pixel: int) -> tuple[list[list[Part]], list[Part]]:
    """The ink in `depth` (H, W) that may be digits, as rows from the top, and the other parts.

    `pixel`: how many pixels wide one of the original image is in `depth`, at least 1.
    """
    level = max(INK_LEVEL * depth.max().item(), MIN_CONTRAST)
    around = 2 * pixel + 1
    step = dilate(depth, around) + dilate(-depth, around)  # maximum - minimum
    parts = [
        part
        for part in find_parts(depth, FAINT * level)
        if part.ink.max() > level
        and np.quantile(step[part.y, part.x], 0.9) > MIN_STEP * part.ink.max()
    ]
    inner = [part for part in parts if part.is_off_border(depth)] or parts
    enclosed = [sum(other.mass for other in inner if other.is_inside(part)) for part in inner]
    marks = [part for part, mass in zip(inner, enclosed) if mass <= ENCLOSED * part.mass]
    rows = group_rows(marks, parts, depth) if marks else []
    return rows, [part for part in parts if not any(part in row for row in rows)]


def group_rows(marks: list[Part], parts: list[Part], image: Tensor) -> list[list[Part]]:
    """Rows from the top, of `marks` and of those other `parts` that stand in line with them."""
    height = typical_height(marks)
    marks = [m for m in marks if m.width <= max(FLAT * m.height, height)] or marks
    height = typical_height(marks)
    tall = [mark for mark in marks if mark.height >= MIN_HEIGHT * height]
    rows: list[list[Part]] = []
    for part in sorted(tall, key=lambda part: part.left):
        near = [row for row in rows if any(part.is_in_line(other) for other in row[-2:])]
        if near:
            max(near, key=lambda row: row[-1].right).append(part)
        else:
            rows.append([part])
    for part in parts:
        if part not in tall:
            row = min(rows, key=lambda row: min(part.gap(other) for other in row))
            is_digit = len(row) > 1 and not part.is_cut(image) and could_be_digit(part, row)
            if part in marks or is_digit:
                row.append(part)
    return sorted(rows, key=lambda row: min(part.top for part in row))


def could_be_digit(part: Part, row: list[Part]) -> bool:
    """Whether `part` stands in line with a `row`, and is about as tall."""
    height = typical_height(row)
    surrounds = any(digit.is_inside(part) for digit in row)
    most = FRAME if surrounds else MAX_HEIGHT
    is_as_tall = MIN_HEIGHT * height < part.height < most * height
    return is_as_tall and part.is_in_line(min(row, key=part.gap))


# --- Digits of a row ---

FINE = 80  # pixels: the height at which digits are cut out
ROOM = 0.15  # of a digit's height, around a row: for ink too fine for the overview
MIN_PART = 0.03  # of the heaviest part's ink: smaller parts are specks
SMALL = 0.35  # of a digit's height: a shorter part joins a digit that is NEAR, or is dropped
NEAR = 1 / 2  # of a digit's height
LOW = 0.6  # of it: a shorter part joins a digit that is a CRACK away
CRACK = 0.12  # of it
MAX_POINTS = 1500  # of a part are compared


def cut_row(gray: Tensor, paper: Tensor, row: list[Part]) -> list[Tensor]:
    """The digits of `row`, on the grid of `paper` (h, w), cut from `gray` (H, W), from the left.

    Each is uint8 (28, 28).
    """
    height = typical_height(row)
    room = round(ROOM * height)
    top = max(0, min(part.top for part in row) - room)
    bottom = min(paper.shape[0], max(part.bottom for part in row) + room)
    left = max(0, min(part.left for part in row) - room)
    right = min(paper.shape[1], max(part.right for part in row) + room)
    zoom = FINE / height
    size = round(zoom * (bottom - top)), round(zoom * (right - left))
    scale_y, scale_x = (of_gray / of_paper for of_gray, of_paper in zip(gray.shape, paper.shape))
    y = slice(round(top * scale_y), round(bottom * scale_y))
    x = slice(round(left * scale_x), round(right * scale_x))
    known = resize(mask_of(row, paper)[top:bottom, left:right].float(), *size).numpy() > 0.5
    depth = ink_depth(resize(gray[y, x], *size), resize(paper[top:bottom, left:right], *size))
    level = INK_LEVEL * depth.max().item()
    parts = [part for part in find_parts(depth, FAINT * level) if part.ink.max() > level]
    parts = [part for part in parts if known[part.y, part.x].any()]
    masks = [mask_of([digit], depth) for digit in join_parts(parts)]
    return [prepare(depth, dilate(mask.float(), 3)) for mask in masks]


def join_parts(parts: list[Part]) -> list[Part]:
    """The digits that the `parts` of a row make, from the left. `parts` begin with the heaviest."""
    parts = [part for part in parts if part.mass >= MIN_PART * parts[0].mass]
    height = typical_height(parts)
    digits: list[Part] = []
    for part in parts:
        beyond = [distance_beyond(part, digit, height) for digit in digits]
        if min(beyond, default=0) < 0:
            digit = digits.pop(beyond.index(min(beyond)))
            pairs = zip((digit.y, digit.x, digit.ink), (part.y, part.x, part.ink))
            part = Part(*map(np.concatenate, pairs))
        digits.append(part)
    digits = [part for part in digits if part.height >= SMALL * height]
    return sorted(digits, key=lambda part: part.left + part.right)


def distance_beyond(a: Part, b: Part, height: int) -> float:
    """How much farther apart two parts are than within a digit, in pixels; below 0 they are one.

    Any larger number is returned as 0. `height` is a digit's, in pixels.
    """
    shared = min(a.right, b.right) - max(a.left, b.left)
    shorter = min(a.height, b.height) / height
    near = CRACK * height if shorter < LOW else 0
    if shared > min(a.width, b.width) / 2 or shorter < SMALL:  # one above the other, or a dash
        near = NEAR * height
    if a.gap(b) >= near:
        return 0
    places = [np.stack([p.y, p.x], 1)[:: len(p.y) // MAX_POINTS + 1] for p in (a, b)]
    return torch.cdist(*(torch.tensor(place).float() for place in places)).min().item() - near


# --- MNIST's form ---

DIGIT_SIZE = 20  # MNIST's digits fit into 20 x 20 of the 28 x 28 pixels
ZOOM = 3  # times MNIST's size, while a digit is prepared
MIN_STROKE = 2.0  # pixels: thinner pens are thickened; most of MNIST's strokes are 1.6 to 3.6 wide


def prepare(depth: Tensor, place: Tensor) -> Tensor:
    """The digit in `depth` (H, W) where `place` (H, W) is above 0, as in MNIST: uint8 (28, 28)."""
    digit = fit_within(crop(depth * place, place > 0), ZOOM * (DIGIT_SIZE + 4))
    full = digit[digit > 0.4 * digit.max()].quantile(0.6)  # the middle of a stroke
    ink = (2 * digit / full - 0.5).clamp(0, 1)  # 0 at full / 4, 1 at full * 3 / 4
    ink = crop(ink, ink > 0.5)
    pixel = max(ink.shape) / DIGIT_SIZE  # one of MNIST's
    ink = F.pad(ink, [2 * ZOOM] * 4)
    stroke = 2 * ink.sum().item() / outline(ink)  # its width
    ink = dilate(ink, 2 * round(max(MIN_STROKE * pixel - stroke, 0) / 2) + 1)
    ink = fit_within(crop(ink, ink > 0.5), DIGIT_SIZE)
    height, width = ink.shape
    mass = ink.sum()  # its centre comes to pixel (14, 14)
    top = round(IMAGE_SIZE / 2 - (torch.arange(float(height)) @ ink.sum(1) / mass).item())
    left = round(IMAGE_SIZE / 2 - (torch.arange(float(width)) @ ink.sum(0) / mass).item())
    ink = F.pad(ink, [left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top])
    return (255 * ink / ink.max()).round().byte()


def outline(ink: Tensor) -> float:
    """The length in pixels of the edges in `ink` (H, W): the sum of its gradient."""
    return torch.hypot(ink.diff(dim=0)[:, 1:], ink.diff(dim=1)[1:]).sum().item()


# --- Grids ---


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(H, W) to (height, width): averages to make it smaller, interpolates to make it larger."""
    size = height, width
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]


def fit_within(image: Tensor, side: int) -> Tensor:
    """(H, W) in proportion, the longer side `side` pixels."""
    return resize(image, *(max(1, round(n * side / max(image.shape))) for n in image.shape))


def dilate(image: Tensor, side: int) -> Tensor:
    """The maximum of (H, W) over a square of `side` pixels, an odd number, around each pixel."""
    return dilate_along_y(dilate_along_y(image, side).t(), side).t()


def dilate_along_y(image: Tensor, side: int) -> Tensor:
    """The maximum of (H, W) over `side` pixels above, at and below each pixel."""
    return F.max_pool1d(image.t(), side, 1, side // 2).t()


def crop(image: Tensor, mask: Tensor) -> Tensor:
    """The smallest rectangle of (H, W) that holds all of `mask` (H, W)."""
    rows = mask.any(1).nonzero()
    columns = mask.any(0).nonzero()
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
