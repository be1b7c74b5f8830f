"""Zeros with slashes, ones with flags (few with a base), sevens with bars, nines with tails.

MNIST's writers were Americans, who hardly ever draw them. A point is a complex number x + iy in
pixels, y downwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from model import IMAGE_SIZE
from utils import Split

PROBABILITY = {0: 0.12, 1: 0.25, 7: 0.25, 9: 0.25}  # that an image is shown as its variant
ROOM = 10  # pixels around an image, for strokes that leave it until it is centred again
OPEN = 7  # pixels: a zero with a narrower hole gets no slash, which would fill it


def draw_variants(split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """The `variants` of `utils.Loader`: images uint8 (N, 1, 28, 28), probabilities (N,).

    The probability is PROBABILITY, or 0 where there is no variant.
    """
    variants = split.images.clone()
    probability = torch.zeros(len(split), device=variants.device)
    generator = torch.Generator().manual_seed(utils.derive_seed(utils.VARIANTS, seed))
    for digit, p in PROBABILITY.items():
        found = (split.labels == digit).nonzero().squeeze(1)
        for index in found.split(128):  # as many as fit a CPU's cache
            ink = F.pad(split.images[index, 0].cpu() / 255, [ROOM] * 4)
            drawn = center_by_mass(draw_variant(ink, digit, generator))
            variants[index, 0] = (255 * drawn).round().byte().to(variants.device)
            allowed = is_open(ink) if digit == 0 else torch.ones(len(index))
            probability[index] = p * allowed.to(variants.device)
    return variants, probability


def is_open(ink: Tensor) -> Tensor:
    """Which zeros of `ink` (N, side, side) have a hole wide enough for a slash: bool (N,)."""
    side = ink.shape[1]
    row = ink[:, side // 2] > 0.5
    left = row.int().argmax(1)
    right = side - row.flip(1).int().argmax(1)
    return right - left - row.sum(1) >= OPEN


def draw_variant(ink: Tensor, digit: int, generator: torch.Generator) -> Tensor:
    """Draw the stroke that belongs to `digit` on each of `ink` (N, side, side), 0 to 1."""
    side = ink.shape[1]
    inked_rows = (ink > 0.5).any(2).int()
    top = inked_rows.argmax(1)
    height = side - 1 - inked_rows.flip(1).argmax(1) - top
    middles = (ink + 1e-6) @ torch.arange(float(side)) / (ink + 1e-6).sum(2)  # of each row

    def at(share: Tensor | float) -> Tensor:
        """The middle of the ink at `share` of the digit's height, 0 (top) to 1 (bottom)."""
        rows = (top + share * height).round().long()
        return torch.complex(middles.gather(1, rows.unsqueeze(1)).squeeze(1), rows.float())

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(ink), generator=generator)

    def vector(low: float, high: float, degrees: Tensor) -> Tensor:
        """`low` to `high` times the digit's height long; 0 degrees point right, 90 down."""
        return torch.polar(uniform(low, high) * height, torch.deg2rad(degrees))

    width = uniform(1.2, 3.0)
    if digit == 0:
        middle = at(uniform(0.4, 0.6))
        half = vector(0.55, 1.0, uniform(-90, -25))
        return draw_stroke(ink, middle - half, middle + half, width)
    if digit == 1:
        tip = at(0.0)
        ink = draw_stroke(ink, tip, tip + vector(0.25, 1.0, 180 - uniform(26, 66)), width)
        foot = at(1.0)
        left = foot - uniform(0.1, 0.3) * height
        right = foot + uniform(0.1, 0.3) * height
        some = slice(None, None, 7)  # every seventh gets a base as well
        ink[some] = draw_stroke(ink[some], left[some], right[some], width[some])
        return ink
    if digit == 7:
        stem = at(uniform(0.42, 0.62))
        tilt = uniform(-20, 10)
        left = stem - vector(0.12, 0.35, tilt)
        right = stem + vector(0.15, 0.4, tilt)
        return draw_stroke(ink, left, right, width)
    foot = at(1.0)  # of a nine
    bend = foot + vector(0.12, 0.3, uniform(160, 190))
    end = bend + vector(0.08, 0.3, uniform(185, 230))
    return draw_stroke(draw_stroke(ink, foot, bend, width), bend, end, width)


def draw_stroke(ink: Tensor, start: Tensor, end: Tensor, width: Tensor) -> Tensor:
    """`ink` (N, side, side), 0 to 1, with a straight stroke from `start` to `end` (N,).

    It is `width` (N,) pixels wide.
    """
    pixels = torch.arange(float(ink.shape[1]))
    start, end, width = (part.view(-1, 1, 1) for part in (start, end, width))
    x = pixels - start.real
    y = pixels.unsqueeze(1) - start.imag
    length = (end - start).abs().clamp(min=1e-6)
    dx = (end - start).real / length
    dy = (end - start).imag / length
    along = (x * dx + y * dy).clamp(min=0).minimum(length)  # from start to the nearest point
    distance = ((x - along * dx).square() + (y - along * dy).square()).sqrt()
    return torch.maximum(ink, (width / 2 + 0.5 - distance).clamp(0, 1))


def center_by_mass(ink: Tensor) -> Tensor:
    """`ink` (N, side, side) as images (N, 28, 28) with the centre of mass at pixel (14, 14).

    As in MNIST. An image is moved by whole pixels, and made smaller if ink would come nearer than
    2 pixels to the edge.
    """
    half = IMAGE_SIZE / 2
    line = torch.arange(float(ink.shape[1]))
    profiles = torch.stack([ink.sum(1), ink.sum(2)], 1)  # (N, 2, side): along x and along y
    center = (profiles @ line / profiles.sum(2)).round().unsqueeze(2)
    reach = ((line - center).abs() * (profiles > 0)).amax((1, 2)).view(-1, 1, 1)
    shrink = (reach / (half - 2)).clamp(min=1)
    sources = center + shrink * (torch.arange(IMAGE_SIZE) - half)  # (N, 2, 28)
    x, y = (sources * 2 / (len(line) - 1) - 1).unbind(1)  # grid_sample: -1 to 1 from edge to edge
    shape = len(ink), IMAGE_SIZE, IMAGE_SIZE
    grid = torch.stack([x.unsqueeze(1).expand(shape), y.unsqueeze(2).expand(shape)], 3)
    return F.grid_sample(ink.unsqueeze(1), grid, align_corners=True).squeeze(1)
