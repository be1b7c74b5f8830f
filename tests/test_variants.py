"""extras/variants.py: slashes through zeros, flags on ones, bars on sevens, tails on nines."""

import pytest
import torch
from conftest import mnist
from torch import Tensor

from extras.variants import PROBABILITY, draw_variants
from utils import Split


@pytest.fixture(scope="module")
def drawn() -> tuple[Split, Tensor, Tensor]:
    """The first 3,000 training images, their variants, and the probability of each to be shown."""
    digits = mnist(train=True).select(slice(3000))
    return digits, *draw_variants(digits, seed=0)


def test_ones_sevens_nines_and_open_zeros_have_a_variant_and_no_other(drawn):
    digits, images, probability = drawn
    assert images.dtype == torch.uint8 and images.shape == digits.images.shape
    for digit in range(10):
        found = probability[digits.labels == digit]
        assert found.max().item() == pytest.approx(PROBABILITY.get(digit, 0.0))
        assert (found > 0).float().mean() > 0.7 if digit == 0 else found.min() == found.max()
    changed = (images != digits.images).flatten(1).any(1)
    assert changed[probability > 0].all()
    assert not changed[~torch.isin(digits.labels, torch.tensor([*PROBABILITY]))].any()
    assert torch.equal(images, draw_variants(digits, seed=0)[0])
    assert not torch.equal(images, draw_variants(digits, seed=1)[0])


def test_each_shape_is_where_it_belongs():
    """On a vertical stroke: a flag above on the left, a bar across, a tail below on the left."""
    images = torch.zeros(21, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 4:24, 13:15] = 255
    labels = torch.tensor([1, 7, 9]).repeat_interleave(7)
    ink = draw_variants(Split(images, labels), seed=0)[0][:, 0].float()
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


def test_a_slash_crosses_wide_rings_from_lower_left_to_upper_right():
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    radius = torch.hypot(x - 14, y - 14)
    rings = [(9 - (radius - r).abs() * 9).clamp(0, 1) for r in (9.0, 3.0)]  # one has no room
    rings = (255 * torch.stack(rings)).byte().unsqueeze(1).repeat_interleave(20, 0)
    split = Split(rings, torch.zeros(40, dtype=torch.long))
    images, probability = draw_variants(split, seed=0)
    assert (probability[:20] > 0).all() and not probability[20:].any()
    ink = images[:20, 0].float() / 255
    assert (ink[:, 12:16, 12:16].amax((1, 2)) > 0.9).all()
    upper_left, lower_right = ink[:, :9, :9].sum((1, 2)), ink[:, 19:, 19:].sum((1, 2))
    upper_right, lower_left = ink[:, :9, 19:].sum((1, 2)), ink[:, 19:, :9].sum((1, 2))
    assert (upper_right + lower_left).sum() > 1.5 * (upper_left + lower_right).sum()
