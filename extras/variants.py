"""National variants: a slash through zeros, a flag and rarely a base on ones, a bar through sevens, a tail under nines.

MNIST's writers were Americans, who hardly ever draw them. A point is a complex number x + iy in pixels, y downwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from model import IMAGE_SIZE
from utils import Split

PROBABILITY = {0: 0.12, 1: 0.25, 7: 0.25, 9: 0.25}  # that an image of a digit is shown as its variant
ROOM = 10  # pixels around an image, for strokes that leave it until it is centred again
OPEN = 7  # pixels: a zero with a narrower hole gets no slash, which would fill it


def draw_variants(split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """(variants uint8 (N, 1, 28, 28), probability (N,) of each to be shown), the `variants` of `utils.Loader`.

    The probability is PROBABILITY, or 0 where there is no variant.
    """
    probability = torch.zeros(len(split.labels), device=split.labels.device)
    variants = split.images.clone()
    generator = torch.Generator().manual_seed(utils.derive_seed(utils.VARIANTS, seed))
    for digit, of_digit in PROBABILITY.items():
        for index in (split.labels == digit).nonzero().squeeze(1).split(128):  # as many as fit a CPU's cache
            ink = F.pad(split.images[index, 0].cpu() / 255, [ROOM] * 4)
            drawn = center_by_mass(draw_variant(ink, digit, generator))
            variants[index, 0] = (255 * drawn).round().byte().to(variants.device)
            allowed = is_open(ink).float() if digit == 0 else torch.ones(len(index))
            probability[index] = of_digit * allowed.to(probability.device)
    return variants, probability


def is_open(ink: Tensor) -> Tensor:
    """Which zeros of `ink` (N, side, side) have a hole wide enough for a slash: bool (N,)."""
    row = ink[:, ink.shape[1] // 2] > 0.5
    first, last = row.int().argmax(1), ink.shape[1] - 1 - row.flip(1).int().argmax(1)
    return last + 1 - first - row.sum(1) >= OPEN


def draw_variant(ink: Tensor, digit: int, generator: torch.Generator) -> Tensor:
    """Draw the stroke that belongs to `digit` on each of `ink` (N, side, side), 0 to 1."""
    side = ink.shape[1]
    inked_rows = (ink > 0.5).any(2).int()
    top = inked_rows.argmax(1)
    height = side - 1 - inked_rows.flip(1).argmax(1) - top
    middles = (ink + 1e-6) @ torch.arange(float(side)) / (ink + 1e-6).sum(2)  # of a blank row: its middle

    def at(part: Tensor | float) -> Tensor:
        """The middle of the ink at `part` of the digit's height, 0 (top) to 1 (bottom)."""
        rows = (top + part * height).round().long()
        return torch.complex(middles.gather(1, rows.unsqueeze(1)).squeeze(1), rows.float())

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(ink), generator=generator)

    def vector(low: float, high: float, degrees: Tensor) -> Tensor:
        """A vector of `low` to `high` times the digit's height; 0 degrees point right, 90 down."""
        return torch.polar(uniform(low, high) * height, torch.deg2rad(degrees))

    width = uniform(1.2, 3.0)
    if digit == 0:
        middle, half = at(uniform(0.4, 0.6)), vector(0.55, 1.0, uniform(-90, -25))
        ink = draw_stroke(ink, middle - half, middle + half, width)
    elif digit == 1:
        tip, foot = at(0.0), at(1.0)
        ink = draw_stroke(ink, tip, tip + vector(0.25, 1.0, 180 - uniform(26, 66)), width)
        left, right = foot - uniform(0.1, 0.3) * height, foot + uniform(0.1, 0.3) * height
        some = slice(None, None, 7)  # these get a base as well
        ink[some] = draw_stroke(ink[some], left[some], right[some], width[some])
    elif digit == 7:
        stem, tilt = at(uniform(0.42, 0.62)), uniform(-20, 10)
        ink = draw_stroke(ink, stem - vector(0.12, 0.35, tilt), stem + vector(0.15, 0.4, tilt), width)
    else:
        foot = at(1.0)
        bend = foot + vector(0.12, 0.3, uniform(160, 190))
        end = bend + vector(0.08, 0.3, uniform(185, 230))
        ink = draw_stroke(draw_stroke(ink, foot, bend, width), bend, end, width)
    return ink


def draw_stroke(ink: Tensor, start: Tensor, end: Tensor, width: Tensor) -> Tensor:
    """`ink` (N, side, side), 0 to 1, with a straight stroke from `start` to `end` (N,), `width` (N,) pixels wide."""
    line = torch.arange(float(ink.shape[1]))
    x, y = (line - start.real.view(-1, 1, 1)), (line.view(-1, 1) - start.imag.view(-1, 1, 1))
    line_vector = (end - start).view(-1, 1, 1)
    length = line_vector.abs().clamp(min=1e-6)
    dx, dy = line_vector.real / length, line_vector.imag / length
    along = (x * dx + y * dy).clamp(min=0).minimum(length)  # from the start to the point nearest to the pixel
    distance = ((x - along * dx).square() + (y - along * dy).square()).sqrt()
    return torch.maximum(ink, (width.view(-1, 1, 1) / 2 + 0.5 - distance).clamp(0, 1))


def center_by_mass(ink: Tensor) -> Tensor:
    """`ink` (N, side, side) as images (N, 28, 28) with the centre of mass at pixel (14, 14), as in MNIST.

    An image is moved by whole pixels, and made smaller if ink would come nearer than 2 pixels to the edge.
    """
    line = torch.arange(float(ink.shape[1]))
    profiles = torch.stack([ink.sum(1), ink.sum(2)], 1)  # (N, 2, side): along x and along y
    center = (profiles @ line / profiles.sum(2)).round().unsqueeze(2)
    reach = ((line - center).abs() * (profiles > 0)).amax((1, 2)).view(-1, 1, 1)
    sources = center + (reach / (IMAGE_SIZE / 2 - 2)).clamp(min=1) * (torch.arange(IMAGE_SIZE) - IMAGE_SIZE / 2)
    x, y = (sources * 2 / (len(line) - 1) - 1).unbind(1)  # grid_sample's units: -1 to 1 from edge to edge
    shape = len(ink), IMAGE_SIZE, IMAGE_SIZE
    grid = torch.stack([x.unsqueeze(1).expand(shape), y.unsqueeze(2).expand(shape)], 3)
    return F.grid_sample(ink.unsqueeze(1), grid, align_corners=True).squeeze(1)
