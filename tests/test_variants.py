"""extras/variants.py: variants of zeros, ones, sevens and nines."""

import pytest
import torch
from conftest import mnist

from extras.variants import PROBABILITY, draw_variants
from utils import Split


def test_ones_sevens_nines_and_open_zeros_have_a_variant():
    digits = mnist(train=True).select(slice(3000))
    images, probability = draw_variants(digits, seed=0)
    for digit in range(10):
        found = probability[digits.labels == digit]
        assert found.max().item() == pytest.approx(PROBABILITY.get(digit, 0))
        assert (found > 0).float().mean() > 0.7 if digit == 0 else found.min() == found.max()
    assert (images != digits.images)[probability > 0].flatten(1).any(1).all()
    assert torch.equal(images, draw_variants(digits, seed=0)[0])
    assert not torch.equal(images, draw_variants(digits, seed=1)[0])


def test_each_shape_is_where_it_belongs():
    """A flag above on the left, a bar across, a tail below on the left."""
    images = torch.zeros(21, 1, 28, 28).byte()
    images[:, :, 4:24, 13:15] = 255
    labels = torch.tensor([1, 7, 9]).repeat_interleave(7)
    ink = draw_variants(Split(images, labels), seed=0)[0][:, 0].float()
    for digit, image in zip(labels, ink):
        x = image.sum(0).argmax()  # of the stroke
        left, right = image[:, : x - 2], image[:, x + 3 :]
        if digit == 1:
            assert left[:14].sum() > right[:14].sum()
        elif digit == 7:
            assert left.sum() > 0 and right[8:20].sum() == right.sum() > 0
        else:
            assert left[14:].sum() > 0 and left[:14].sum() == right.sum() == 0


def test_a_slash_rises_through_wide_rings():
    line = torch.arange(28.0) - 14
    radius = torch.hypot(line, line.unsqueeze(1))
    rings = torch.stack([9 - (radius - r).abs() * 9 for r in (9, 3)])  # one has no room
    rings = (255 * rings.clamp(0, 1)).byte().unsqueeze(1).repeat_interleave(20, 0)
    images, probability = draw_variants(Split(rings, torch.zeros(40)), seed=0)
    assert (probability[:20] > 0).all() and not probability[20:].any()
    ink = images[:20, 0].float()
    assert (ink[:, 12:16, 12:16].amax((1, 2)) > 230).all()
    rising = ink[:, :9, 19:].sum() + ink[:, 19:, :9].sum()
    falling = ink[:, :9, :9].sum() + ink[:, 19:, 19:].sum()
    assert rising > 1.5 * falling
