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
    reported too. UserError for a folder whose name is no number, or with `raw` no class.
    """
    files = find_images(paths)
    for folder in {file.absolute().parent for file in files}:
        is_number = not raw and folder.name.replace(" ", "").isdecimal()
        if labels and not is_number and folder.name not in CLASS_NAMES:
            raise UserError(f"--labels: {folder} is named after no {'class' if raw else 'number'}")
    images = [report for _, _, report in read_files(model, files, raw)]
    results: dict[str, Any] = {"images": images}
    if labels and images:
        for image in images:
            image["label"] = Path(image["path"]).absolute().parent.name
        right = sum(is_right(image["number"], image["label"]) for image in images)
        results.update(accuracy=right / len(images), right=right, labelled=len(images))
    return results, len(files) - len(images)


def is_right(number: str, label: str) -> bool:
    """Whether `label` says the same as `number`, whatever its rows; 07 does for a single 7."""
    label = label.replace(" ", "")
    is_same = len(number) == 1 and number.lstrip("0") == label.lstrip("0")
    return is_same or number.replace(" ", "") == label


def print_images(results: dict[str, Any]) -> None:
    """Print what `read_images` returned: a line for each image, and the accuracy if known."""
    for image in results["images"]:
        guess = f"\tor perhaps {image['second_guess']}" if "second_guess" in image else ""
        doubt = f"\t{image['doubt']}" if "doubt" in image else ""
        print(f"{image['path']}\t{image['number']}\t{image['confidence']:.4f}{guess}{doubt}")
    if "accuracy" in results:
        share = f"{results['right']} of {results['labelled']}"
        print(f"Accuracy: {results['accuracy']:.2%} ({share})")


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
        yield image, digits, {**report, "doubt": MORE} if is_doubtful else report


def classify(model: nn.Module, digits: Tensor, tta: bool = True) -> Tensor:
    """Probabilities float (N, 10), on the CPU, of prepared digits uint8 (N, 28, 28)."""
    device = next(model.parameters()).device
    return utils.predict(model, digits.unsqueeze(1).to(device), tta).softmax(1).cpu()


def describe(path: Path, probabilities: Tensor, row_lengths: Sequence[int]) -> dict[str, Any]:
    """The report on one image: `probabilities` (N, 10) of its digits, so many in each row."""
    confidences, digits = probabilities.max(1)
    each = zip(digits.tolist(), confidences.tolist(), probabilities.tolist())
    report = {
        "path": str(path),
        "number": digits_to_text(digits, row_lengths),
        "confidence": confidences.min().item(),
        "digits": [{"digit": d, "confidence": c, "probabilities": p} for d, c, p in each],
    }
    guess = second_guess(probabilities, row_lengths)
    return {**report, "second_guess": guess} if guess else report


def second_guess(probabilities: Tensor, row_lengths: Sequence[int] = ()) -> str | None:
    """The number with the second guess for the least sure digit of (N, 10), if below UNSURE."""
    confidences, digits = probabilities.max(1)
    least = int(confidences.argmin())
    digits[least] = probabilities[least].topk(2).indices[1]
    return digits_to_text(digits, row_lengths) if confidences[least] < UNSURE else None


def digits_to_text(digits: Tensor, row_lengths: Sequence[int] = ()) -> str:
    """Digits (N,) as a string, with a blank between rows of so many; one row if not told."""
    rows = digits.split(list(row_lengths) or len(digits))
    return " ".join("".join(CLASS_NAMES[digit] for digit in row) for row in rows)


# --- Files ---

MIN_SIDE = 8  # pixels: smaller images are refused
MAX_PIXELS = 64 * 2**20  # larger images are refused
WORK_SIZE = 512  # pixels a side: larger images are averaged down to this first
STRIP = 4  # times as long as high: what is longer is a strip, and stays larger
LONGEST = 16  # times as long as other images is a strip at most
DARK = 0.05  # of what is visible: with less of it dark, a transparent image is a light drawing
FRAMES = {"GIF", "PNG", "WEBP", "AVIF"}  # formats that move
HEIF = {".heic", ".heif"}  # the format of iPhones
HEIF_PACKAGE = "pillow-heif"


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths`, with * and ? expanded, and the images in its folders, at any depth.

    An image has an ending that Pillow reads. A warning names the other files. A folder without any
    image stands for itself.
    """
    readable = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    skipped = []
    for pattern in paths:
        matches = [] if os.path.exists(pattern) else sorted(map(Path, glob.glob(str(pattern))))
        for path in matches or [pattern]:
            files = visible_files(path) if os.path.isdir(path) else []  # Path's fails on long names
            images = [file for file in files if file.suffix.lower() in readable]
            found += sorted(images) or [path]
            skipped += [file.suffix.lower() for file in files if file not in images]
    if skipped:
        needs = {kind: f"{kind} (needs {HEIF_PACKAGE})" for kind in HEIF} | {"": "no ending"}
        kinds = ", ".join(needs.get(kind, kind) for kind in sorted(set(skipped)))
        utils.say("warning", f"{len(skipped)} file{'s' * (len(skipped) > 1)} skipped: {kinds}")
    return found


def visible_files(folder: Path) -> list[Path]:
    """The files below `folder`, at any depth, without those whose name or folder begins with ."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts)]


def read_number(path: str | Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB, and its digits as MNIST has them: uint8 (N, 28, 28), ink 255.

    Raises UserError, one line naming the file, if it cannot be read or is blank.
    """
    return read_rows(path)[:2]


def read_raw(path: str | Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB, and as the network sees it, ink 255: uint8 (1, 28, 28).

    Raises UserError, one line naming the file, if it has another size.
    """
    image = open_image(path)
    width, height = image.size
    if width != IMAGE_SIZE or height != IMAGE_SIZE:
        raise UserError(f"{path}: {width} x {height} pixels; --raw needs {IMAGE_SIZE} a side")
    return image, torch.from_numpy(np.array(image.convert("L")))[None]


def read_rows(path: str | Path) -> tuple[Image.Image, Tensor, list[int], bool]:
    """As `read_number`; how many digits are in each row; whether there are perhaps more digits."""
    image = open_image(path)
    for channel in (image.convert("L"), *image.split()):  # red ink on green may be blank in grey
        gray = torch.from_numpy(np.asarray(channel, np.float32) / 255)
        rows, is_doubtful = find_digits(erase_lines(erase_lines(gray).t()).t().contiguous())
        if rows:
            return image, torch.cat(rows), [len(row) for row in rows], is_doubtful
    raise UserError(f"{path}: blank, no ink found")


def open_image(path: str | Path) -> Image.Image:
    """The image as people see it: upright, without transparency; RGB, about 512 pixels a side."""
    image = load_image(path)
    if image.mode[0] in "IF":  # 16 bits or floating point, to be stretched
        values = np.asarray(ImageOps.exif_transpose(image), np.float32)
        values = (values - values.min()) * (255 / max(np.ptp(values), 1e-6))
        image = Image.fromarray(np.uint8(values))
    elif image.mode not in ("L", "RGB") or image.has_transparency_data:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = ImageOps.exif_transpose(image.reduce(math.ceil(strip_side(image.size) / WORK_SIZE)))
    return (on_backdrop(image) if image.mode == "RGBA" else image).convert("RGB")


def strip_side(size: Sequence[int]) -> int:
    """The longer side of an image of `size`, or of a strip STRIP times the shorter one."""
    return max(min(max(size), STRIP * min(size)), max(size) // LONGEST)


def load_image(path: str | Path) -> Image.Image:
    """The image at `path` as it is stored; UserError, one line naming the file, if it cannot be."""
    if os.path.isdir(path):
        raise UserError(f"{path}: no images in this folder")
    try:
        with warnings.catch_warnings(record=True), Image.open(path) as image:  # of odd files
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ValueError(f"{width} x {height} pixels are too few, {MIN_SIDE} are needed")
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            image.draft(None, (WORK_SIZE, WORK_SIZE))  # decodes a large JPEG at a half or less
            count = getattr(image, "n_frames", 1)
            if image.format == "TIFF" and count > 1:
                utils.say("warning", f"{path}: only the first of {count} pages is read")
            if image.format in FRAMES and count > 1:
                return last_frame(image)
            image.load()
            return image
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or utils.one_line(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no image Pillow can read"
            if Path(path).suffix.lower() in HEIF - set(Image.registered_extensions()):
                reason = f"needs the package {HEIF_PACKAGE}: pip install {HEIF_PACKAGE}"
        raise UserError(f"{path}: {reason}") from error


def last_frame(image: Image.Image) -> Image.Image:
    """The last frame with ink, where a digit that draws itself is complete."""
    last = None
    for frame in ImageSequence.Iterator(image):
        ranges = frame.convert("RGBA").getextrema()
        has_ink = any(high - low > 255 * MIN_CONTRAST for low, high in ranges)
        if has_ink or last is None:
            last = frame.copy()
    return last


def on_backdrop(image: Image.Image) -> Image.Image:
    """RGBA on white, or on black if all of its visible part is light, but for an edge."""
    visible = image.getchannel("A").point(lambda alpha: alpha > 127 and 255)
    dark = ImageStat.Stat(image.convert("L").point(lambda value: value < 128 and 255), visible)
    is_light = dark.sum[0] <= 255 * DARK * dark.count[0]
    backdrop = Image.new("RGBA", image.size, "black" if is_light else "white")
    backdrop.alpha_composite(image)
    return backdrop


# --- From an image to rows of parts ---

OVERVIEW_SIZE = 128  # pixels a side: a digit in a row of ten is still ten pixels high
WINDOW = 2 / 5  # of the shorter side: wider than strokes, narrower than most shadows and sheets
CLEAR = 8  # pixels: where digits are lower, the overview is made twice as large
WIDE = 1.5  # times its height: a wider digit is perhaps two that touch
NARROW = 3 / 4  # of a digit's height, once it is known: anything wider is no stroke


def find_digits(gray: Tensor, size: int = 0) -> tuple[list[Tensor], bool]:
    """The digits of each row in `gray`, uint8 (N, 28, 28), and whether there are perhaps more.

    Rows are found in an overview, whose longer side has `size` pixels, and that twice. The second
    time the height of the digits is known, and paper is what is wider than their strokes.
    """
    size = size or OVERVIEW_SIZE * max(gray.shape) // strip_side(gray.shape)
    overview = fit_within(gray, size)
    tile = find_tile(overview)
    if tile:
        top, bottom, left, right = (round(n * max(gray.shape) / size) for n in tile)
        inside = find_digits(gray[top:bottom, left:right])
        if inside[0]:
            return inside
    if asymmetry(overview) > LIGHT:
        gray = 1 - gray
        overview = 1 - overview
    pixel = math.ceil(size / max(gray.shape))
    window = int(WINDOW * min(overview.shape))
    rows, _ = find_rows(ink_depth(overview, find_paper(overview, window)), pixel)
    height = typical_height(sum(rows, []))
    if height < CLEAR and size < max(gray.shape):
        return find_digits(gray, min(2 * size, max(gray.shape)))
    paper = find_paper(overview, min(window, int(NARROW * height)))
    rows, others = find_rows(ink_depth(overview, paper), pixel)
    digits = [cut_row(gray, paper, row) for row in rows]
    is_doubtful = any(could_be_digit(part, row, overview) for part in others for row in rows)
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
BLOCKS = 24  # of columns: in each the line has one height
GAPS = 0.3  # of the blocks: in so many a line may be faded or hidden
LINE = 0.03  # of the paper's light, above what noise takes: a paler line does no harm
OPEN_END = 1 / 2  # of the line's depth: less of it in the outer blocks, and it is somebody's stroke
DEEPER = 3  # times the line's depth: that is ink which crosses it, and it stays


def erase_lines(gray: Tensor) -> Tensor:
    """`gray` (H, W) without the dark lines that cross it from the left border to the right.

    A line is thin, straight and about as deep everywhere. Ink that crosses it is deeper, or is not
    thin where it crosses.
    """
    height, width = gray.shape
    side = 2 * round(THIN * width / 2) + 1
    darker = F.pad(gray, [0, 0, side, side])  # beyond the border, so that dark edges are not thin
    paper = -dilate_along_y(-dilate_along_y(darker, side), side)[side:-side]
    depth = (paper - gray) / paper.clamp(min=0.2)  # of marks that are thin along y
    thin = dilate_along_y(depth, 3)[::2]  # half of the rows are enough
    thin = F.adaptive_avg_pool2d(thin[None], (len(thin), BLOCKS))[0]
    middles = (torch.arange(BLOCKS) + 0.5) * width / BLOCKS - width / 2
    rise = (torch.linspace(-SLOPE, SLOPE, SLOPES)[:, None] * middles / 2).round().long()
    room = int(rise.max())
    thin = F.pad(thin, [0, 0, room, room], value=math.inf)  # beyond the image a line may go on
    first_rows = torch.arange(room, len(thin) - room)
    places = (first_rows[:, None, None] + rise).flatten(0, 1)  # a line's row in each block: (N, 24)
    depths = thin.gather(0, places).nan_to_num(posinf=0).kthvalue(1 + int(GAPS * BLOCKS)).values
    bent = dilate_along_y(thin, 5).gather(0, places)  # paper bends at its edges
    ends = torch.minimum(bent[:, :2].amax(1), bent[:, -2:].amax(1))
    is_line = (depths > depths.median() + LINE) & (ends > OPEN_END * depths)
    found = torch.where(is_line, depths, 0.0)[:, None].expand(places.shape)
    lines = torch.zeros_like(thin).scatter_reduce(0, places, found, "amax")
    lines = dilate_along_y(lines, 3)[room : len(thin) - room]
    lines = lines[torch.arange(height) // 2][:, torch.arange(width) * BLOCKS // width]
    return gray + paper * torch.minimum(depth, (DEEPER * lines - depth).clamp(min=0))


# --- Whether ink is dark or light, and tiles ---

SKEW_SIZE = 32  # pixels a side, to tell ink from paper by its rarity
LIGHT = 0.9  # of asymmetry: with more of it the ink is light; a photo's uneven light has some, too
BORDER = 0.25  # at most, of asymmetry: a tight digit has paper at the border, a sheet has a desk
TILE = 1 / 4  # of the longer side: a smaller rectangle is no tile
SOLID = 0.9  # of an edge: what is less complete is no tile


def asymmetry(gray: Tensor) -> float:
    """How much `gray` looks like light ink on dark: ink is rare, and it is not at the border."""
    gray = fit_within(gray, SKEW_SIZE)
    flat = gray - resize(resize(gray, 3, 3), *gray.shape)  # without uneven light
    flat = (flat - flat.mean()) / flat.std().clamp(min=1e-6)
    border = torch.cat([flat[0], flat[-1], flat[:, 0], flat[:, -1]]).mean()
    return ((flat**3).mean() - border.clamp(-BORDER, BORDER)).item()


def find_tile(gray: Tensor) -> tuple[int, int, int, int] | None:
    """The inside of a solid rectangle, such as a saved figure: top, bottom, left, right."""
    level = (gray.min() + gray.max()) / 2
    for part in find_parts(gray - level, 0) + find_parts(level - gray, 0):
        inside = part.top + 3, part.bottom - 3, part.left + 3, part.right - 3
        is_large = min(part.height, part.width) > TILE * max(gray.shape)
        if is_large and part.height < gray.shape[0] and part.width < gray.shape[1]:
            mask = mask_of([part], gray)[part.top : part.bottom, part.left : part.right].float()
            edges = mask[2], mask[-3], mask[:, 2], mask[:, -3]
            if mask.mean() > 1 / 2 and min(edge.mean() for edge in edges) > SOLID:
                return inside
    return None


# --- Parts ---

MIN_PIXELS = 4  # smaller parts are noise
MAX_PARTS = 200  # so are more parts


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

    def is_cut(self, image: Tensor) -> bool:
        """Whether half of the height of this part is at the left or right border of `image`."""
        at_border = np.isin(self.x, (0, image.shape[1] - 1)).sum()
        return bool(at_border > self.height / 2)

    def is_in_line(self, other: Part) -> bool:
        """Whether more than half of the height of the less high one is beside the other."""
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


# --- Rows ---

MIN_CONTRAST = 0.03  # of the paper's brightness: fainter marks are paper
INK_LEVEL = 1 / 3  # of the darkest ink's depth: fainter marks are shadow or noise
FAINT = 1 / 2  # of that level: enough for ink that touches ink, so that light strokes do not break
MIN_STEP = 0.4  # of the depth, from pixel to pixel: ink has edges, shadows and folds at most 0.3
ENCLOSED = 0.05  # of a part's ink: with as much inside, it is a frame; specks in a zero are less
FLAT = 8  # times its own height: a part that is wider, and wider than digits are high, is a line
MIN_HEIGHT = 1 / 2  # a lower part starts no row
MAX_HEIGHT = 2  # a higher part is no digit of the row
FRAME = 1.2  # a part that surrounds digits and is as high is a frame
THICK = 2  # times the width of a digit's strokes: what is as wide is none
NEAR = 1 / 2  # a small part belongs to a digit that is nearer than this


def find_rows(depth: Tensor, pixel: int) -> tuple[list[list[Part]], list[Part]]:
    """The ink in `depth` (H, W) that may be digits, as rows from the top, and the other parts.

    A pixel of the image is `pixel` pixels wide here.
    """
    parts = find_parts(depth, INK_LEVEL * depth.max())
    inner = [part for part in parts if part.is_off_border(depth)]
    darkest = (inner[0].ink if inner else depth).max().item()
    level = max(INK_LEVEL * darkest, MIN_CONTRAST)
    around = 2 * pixel + 1
    step = dilate(depth, around) + dilate(-depth, around)
    parts = [
        part
        for part in find_parts(depth, FAINT * level)
        if part.ink.max() > level
        and np.quantile(step[part.y, part.x], 0.9) > MIN_STEP * part.ink.max()
    ]
    inner = [part for part in parts if part.is_off_border(depth)] or parts
    inside = [sum(other.mass for other in inner if other.is_inside(part)) for part in inner]
    marks = [part for part, mass in zip(inner, inside) if mass <= ENCLOSED * part.mass]
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
        if len(tall) == 2 and rows and is_split(*tall):
            near = rows
        if near:
            max(near, key=lambda row: row[-1].right).append(part)
        else:
            rows.append([part])
    for part in parts:
        if part not in tall:
            row = min(rows, key=lambda row: min(part.gap(other) for other in row))
            is_back = len(row) > 1 and not part.is_cut(image) and could_be_digit(part, row, image)
            if part in marks or is_back:
                row.append(part)
    return sorted(rows, key=lambda row: min(part.top for part in row))


def is_split(a: Part, b: Part) -> bool:
    """Whether two parts are one digit, as a 5 and its bar: near each other, and one is low."""
    low, high = sorted([a.height, b.height])
    return a.gap(b) < NEAR * high and low < LOW * high


def could_be_digit(part: Part, row: list[Part], image: Tensor) -> bool:
    """Whether `part` stands in line with a `row`, is about as high, and consists of strokes."""
    height = typical_height(row)
    surrounds = any(digit.is_inside(part) for digit in row)
    highest = FRAME if surrounds else MAX_HEIGHT
    as_high = MIN_HEIGHT * height < part.height < highest * height
    if not (as_high and part.is_in_line(min(row, key=part.gap))):
        return False
    return stroke_width([part], image) < THICK * stroke_width(row, image)


def stroke_width(parts: list[Part], image: Tensor) -> float:
    """The mean width of the strokes of `parts` in `image` (H, W), in pixels: 2 area / outline."""
    return 2 * sum(len(part.y) for part in parts) / outline(mask_of(parts, image).float())


# --- Digits of a row ---

FINE = 80  # pixels: the height at which digits are cut out
ROOM = 0.15  # around a row may be ink that the overview was too coarse to see
MIN_PART = 0.03  # of the heaviest part's ink: smaller parts are specks
SMALL = 0.35  # a lower part joins a digit that is NEAR; alone it is no digit
LOW = 0.6  # a lower part joins a digit that is a CRACK away
CRACK = 0.08
MAX_POINTS = 1500  # of a part are compared


def cut_row(gray: Tensor, paper: Tensor, row: list[Part]) -> list[Tensor]:
    """The digits of a `row` of the overview `paper` (h, w), cut from `gray` (H, W), from the left.

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
    """The digits that the `parts` of a row make, from the left. `parts` begin with the heaviest."""
    parts = [part for part in parts if part.mass >= MIN_PART * parts[0].mass]
    height = typical_height(parts)
    crack = CRACK * (1 if len(parts) > 2 else 2)  # two parts are more often one digit
    digits: list[Part] = []
    for part in parts:
        beyond = [distance_beyond(part, digit, height, crack) for digit in digits]
        if min(beyond, default=0) < 0:
            digit = digits.pop(beyond.index(min(beyond)))
            places = ((a.y, a.x, a.ink) for a in (digit, part))
            part = Part(*(np.concatenate(both) for both in zip(*places)))
        digits.append(part)
    digits = [part for part in digits if part.height >= SMALL * height]
    return sorted(digits, key=lambda part: part.left + part.right)


def distance_beyond(a: Part, b: Part, height: int, crack: float) -> float:
    """How much farther apart two inks are than strokes of one digit, in pixels; one is below 0.

    `height` is a digit's, in pixels. `crack` is a share of it.
    """
    shared = min(a.right, b.right) - max(a.left, b.left)
    low = min(a.height, b.height) / height
    near = crack * height if low < LOW else 0
    if shared > min(a.width, b.width) / 2 or low < SMALL:  # one above the other, or a dash
        near = NEAR * height
    if a.gap(b) >= near:
        return 0
    places = [np.stack([p.y, p.x], 1)[:: len(p.y) // MAX_POINTS + 1] for p in (a, b)]
    return torch.cdist(*(torch.tensor(place).float() for place in places)).min().item() - near


# --- MNIST's form ---

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
    image = F.pad(image, [0, 0, side // 2, side // 2], value=-math.inf)
    reach = 1  # of the maximum so far; it doubles
    while reach < side:
        step = min(reach, side - reach)
        image = torch.maximum(image[:-step], image[step:])
        reach += step
    return image


def crop(image: Tensor, mask: Tensor) -> Tensor:
    """The smallest rectangle of (H, W) that holds all of `mask` (H, W)."""
    rows = mask.any(1).nonzero()
    columns = mask.any(0).nonzero()
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
