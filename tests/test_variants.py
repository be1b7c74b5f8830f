"""Flags on ones, bars on sevens and tails on nines: drawn where they belong, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import mnist
from torch import Tensor

import utils
from utils import Split

SHARE = 0.25
DRAWN_ON = 1, 7, 9


@pytest.fixture(scope="module")
def digits() -> Split:
    """The first 3,000 training images."""
    return mnist(train=True).select(slice(3000))


@pytest.fixture(scope="module")
def drawn(digits: Split) -> Split:
    """The same images with variants."""
    return utils.draw_variants(digits, SHARE, seed=0)


def changed(before: Split, after: Split) -> Tensor:
    """Which images differ, (N,)."""
    return (before.images != after.images).flatten(1).any(1)


def test_its_share_of_ones_sevens_and_nines_changes_and_nothing_else(digits: Split, drawn: Split) -> None:
    counts = torch.bincount(digits.labels[changed(digits, drawn)], minlength=10).tolist()
    expected = [round(SHARE * int((digits.labels == digit).sum())) if digit in DRAWN_ON else 0 for digit in range(10)]
    assert counts == expected
    assert drawn.images.dtype == torch.uint8 and drawn.images.shape == digits.images.shape
    assert torch.equal(drawn.labels, digits.labels)


def test_a_share_of_zero_leaves_all_images_as_they_are(digits: Split) -> None:
    assert torch.equal(utils.draw_variants(digits, 0.0, seed=0).images, digits.images)


def test_the_seed_alone_decides(digits: Split, drawn: Split) -> None:
    assert torch.equal(utils.draw_variants(digits, SHARE, seed=0).images, drawn.images)
    assert not torch.equal(utils.draw_variants(digits, SHARE, seed=1).images, drawn.images)


def test_drawn_digits_stay_inside_and_are_centred_by_mass(digits: Split) -> None:
    everything = utils.draw_variants(digits, 1.0, seed=0)
    ink = everything.images[changed(digits, everything), 0].float()
    assert ink[:, 1:-1, 1:-1].count_nonzero() == ink.count_nonzero()
    pixels = torch.arange(28.0)
    for dim in (1, 2):
        center = (ink.sum(dim) * pixels).sum(1) / ink.sum((1, 2))
        assert (center - 14).abs().max() < 0.75  # moved by whole pixels


def test_each_shape_is_where_it_belongs() -> None:
    """On a plain vertical stroke: a flag above on the left, a bar on both sides, a tail below on the left."""
    images = torch.zeros(21, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 4:24, 13:15] = 255
    labels = torch.tensor(DRAWN_ON).repeat_interleave(7)
    ink = utils.draw_variants(Split(images, labels), 1.0, seed=0).images[:, 0].float()
    stroke = ink.sum(1).argmax(1)
    for digit, image, x in zip(labels.tolist(), ink, stroke.tolist()):
        left, right = image[:, : x - 2], image[:, x + 3 :]
        upper, lower = left[:14].sum(), left[14:].sum()
        if digit == 1:
            assert image[:14, :x].sum() > image[:14, x + 2 :].sum()
        elif digit == 7:
            assert left.sum() > 0 and right[8:20].sum() == right.sum() > 0
        else:
            assert lower > 0 and upper == right.sum() == 0


def test_a_stroke_is_as_wide_as_it_says_and_hides_no_ink() -> None:
    ink = torch.zeros(1, 28, 28)
    ink[0, 10, 10] = ink[0, 20, 20] = 0.7
    points = torch.tensor([5 + 10j]), torch.tensor([20 + 10j])
    drawn = utils.draw_stroke(ink, *points, torch.tensor([3.0]))[0]
    assert drawn[9:12, 5:21].min() == 1 and drawn[20, 20] == ink[0, 20, 20]
    assert drawn[:, 12].sum() == pytest.approx(3) and drawn[10].sum() == pytest.approx(16 + 2)  # round ends
