"""Flags on ones, bars on sevens, tails on nines, slashes through zeros: drawn where they belong, nowhere else."""

from __future__ import annotations

import pytest
import torch
from conftest import mnist
from torch import Tensor

import utils
from utils import Augmentation, Loader, Split


@pytest.fixture(scope="module")
def digits() -> Split:
    """The first 3,000 training images."""
    return mnist(train=True).select(slice(3000))


@pytest.fixture(scope="module")
def drawn(digits: Split) -> tuple[Tensor, Tensor]:
    """The variants of the same images, and their shares."""
    return utils.draw_variants(digits, factor=1.0, seed=0)


def test_ones_sevens_nines_and_open_zeros_have_a_variant_and_no_other(digits: Split, drawn: tuple) -> None:
    images, shares = drawn
    assert images.dtype == torch.uint8 and images.shape == digits.images.shape
    for digit in range(10):
        found = shares[digits.labels == digit]
        share = utils.SHARES.get(digit, 0.0)
        assert found.max().item() == pytest.approx(share)
        assert (found > 0).float().mean() > 0.7 if digit == 0 else found.min() == found.max()
    changed = (images != digits.images).flatten(1).any(1)
    assert changed[shares > 0].all() and not changed[~torch.isin(digits.labels, torch.tensor([*utils.SHARES]))].any()


def test_factor_and_seed_decide(digits: Split, drawn: tuple) -> None:
    images, shares = utils.draw_variants(digits, factor=2.0, seed=0)
    assert torch.equal(images, drawn[0]) and torch.equal(shares, 2 * drawn[1])
    assert not torch.equal(utils.draw_variants(digits, factor=1.0, seed=1)[0], drawn[0])
    images, shares = utils.draw_variants(digits, factor=0.0, seed=0)
    assert torch.equal(images, digits.images) and not shares.any()


def test_each_epoch_chooses_anew_and_shows_each_variant_as_often_as_its_share_says(digits: Split) -> None:
    loader = Loader(digits, 1024, Augmentation(variants=1.0), seed=0)
    shown = []
    for _ in range(8):  # all as epoch 0, which shows each image once; the seed makes them differ
        x, _, index = map(torch.cat, zip(*loader))
        plain = torch.empty(len(index), dtype=torch.bool)
        plain[index] = ((255 * x).round().byte() == digits.images[index]).flatten(1).all(1)
        shown.append(~plain)
        loader.seed += 1
    often = torch.stack(shown).float().mean(0)
    for digit in range(10):
        of_digit = digits.labels == digit
        assert often[of_digit].mean() == pytest.approx(loader.shares[of_digit].mean().item(), abs=0.03)
    assert ((often > 0) & (often < 1)).sum() > 0.5 * (loader.shares > 0).sum()


def test_drawn_digits_stay_inside_and_are_centred_by_mass(drawn: tuple) -> None:
    images, shares = drawn
    ink = images[shares > 0, 0].float()
    assert ink[:, 1:-1, 1:-1].count_nonzero() == ink.count_nonzero()
    pixels = torch.arange(28.0)
    for dim in (1, 2):
        center = (ink.sum(dim) * pixels).sum(1) / ink.sum((1, 2))
        assert (center - 14).abs().max() < 0.75  # moved by whole pixels


def test_each_shape_is_where_it_belongs() -> None:
    """On a plain vertical stroke: a flag above on the left, a bar on both sides, a tail below on the left."""
    images = torch.zeros(21, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 4:24, 13:15] = 255
    labels = torch.tensor([1, 7, 9]).repeat_interleave(7)
    ink = utils.draw_variants(Split(images, labels), 1.0, seed=0)[0][:, 0].float()
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


def test_a_slash_crosses_wide_rings_from_lower_left_to_upper_right() -> None:
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    radius = torch.hypot(x - 14, y - 14)
    rings = torch.stack([(9 - (radius - r).abs() * 9).clamp(0, 1) for r in (9.0, 3.0)]).unsqueeze(1)  # one has no room
    split = Split((255 * rings).byte().repeat_interleave(20, 0), torch.zeros(40, dtype=torch.long))
    images, shares = utils.draw_variants(split, 1.0, seed=0)
    assert (shares[:20] > 0).all() and not shares[20:].any()
    ink = images[:20, 0].float() / 255
    assert (ink[:, 12:16, 12:16].amax((1, 2)) > 0.9).all()
    upper_left, lower_right = ink[:, :9, :9].sum((1, 2)), ink[:, 19:, 19:].sum((1, 2))
    upper_right, lower_left = ink[:, :9, 19:].sum((1, 2)), ink[:, 19:, :9].sum((1, 2))
    assert (upper_right + lower_left).sum() > 1.5 * (upper_left + lower_right).sum()


def test_a_stroke_is_as_wide_as_it_says_and_hides_no_ink() -> None:
    ink = torch.zeros(1, 28, 28)
    ink[0, 10, 10] = ink[0, 20, 20] = 0.7
    points = torch.tensor([5 + 10j]), torch.tensor([20 + 10j])
    drawn = utils.draw_stroke(ink, *points, torch.tensor([3.0]))[0]
    assert drawn[9:12, 5:21].min() == 1 and drawn[20, 20] == ink[0, 20, 20]
    assert drawn[:, 12].sum() == pytest.approx(3) and drawn[10].sum() == pytest.approx(16 + 2)  # round ends
