"""The network: its layer table, and that a block trains the function that it evaluates, whatever was edited."""

from __future__ import annotations

import copy
import math
from typing import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune
from conftest import ROOT

import model as network
import utils
from model import ADAPTIVE_POOLS, Block, Dropout, Net, count_parameters, layer_table

SPECIFIED = [  # name, output size (C, H, W), parameters: the specification's; RF and jump out: computed by hand
    ("Input", (1, 28, 28), (), 1, 1),
    ("Conv1", (12, 28, 28), (108, 12), 3, 1),
    ("BatchNorm1", (12, 28, 28), (24,), 3, 1),
    ("MaxPool1", (12, 14, 14), (), 4, 2),
    ("Conv2", (24, 14, 14), (2592, 24), 8, 2),
    ("BatchNorm2", (24, 14, 14), (48,), 8, 2),
    ("MaxPool2", (24, 7, 7), (), 10, 4),
    ("Conv3", (24, 7, 7), (5184, 24), 18, 4),
    ("BatchNorm3", (24, 7, 7), (48,), 18, 4),
    ("Conv4", (12, 7, 7), (288, 12), 18, 4),
    ("BatchNorm4", (12, 7, 7), (24,), 18, 4),
    ("AdaptivePool", (12, 3, 3), (), 26, 8),
    ("FC1", (72,), (7776, 72), None, None),
    ("FC2", (10,), (720, 10), None, None),
]


@pytest.mark.parametrize("adaptive_pool", ADAPTIVE_POOLS)
def test_layer_table_is_the_specifications(adaptive_pool: str) -> None:
    model = Net(adaptive_pool=adaptive_pool)
    rows = layer_table(model)
    assert [(r.name, r.output_size, r.parameters, r.rf, r.jump_out) for r in rows] == SPECIFIED
    assert count_parameters(model) == sum(sum(r.parameters) for r in rows) == 16_966
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_readme_shows_what_the_command_prints(capsys: pytest.CaptureFixture) -> None:
    network.main()
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{12 * 9 * 784 + 24 * 108 * 196 + (24 * 216 + 24 * 12) * 49 + 108 * 72 + 720:,} per image" in printed


def test_an_edited_network_has_a_table() -> None:
    model = Net()
    model.blocks[1].conv = nn.Conv2d(12, 24, 3, padding=2, dilation=2)
    model.blocks[2].norm = nn.GroupNorm(4, 24)
    model.blocks.append(Block(12, 12, 3, nn.AvgPool2d(2), nn.ReLU(), 0.4))
    rows = {row.name: row for row in layer_table(model)}
    assert (rows["Conv2"].rf, rows["GroupNorm1"].parameters) == (4 + 4 * 2, (48,))
    assert (rows["Conv5"].parameters, rows["AvgPool1"].output_size) == ((1296, 12), (12, 3, 3))


def test_receptive_field_is_what_the_gradient_sees() -> None:
    """The central output of block 4 depends on 18 x 18 input pixels and not one more."""
    blocks = Net().eval().blocks
    for block in blocks[:2]:
        block.pool = nn.AvgPool2d(2)  # max pooling's windows, and lets every pixel through
    image = torch.randn(1, 1, 28, 28, requires_grad=True)
    blocks(image)[0, :, 3, 3].sum().backward()
    rows, columns = (image.grad[0, 0] != 0).any(1), (image.grad[0, 0] != 0).any(0)
    for seen in (rows.nonzero(), columns.nonzero()):
        assert int(seen.max() - seen.min()) + 1 == 18


def swap_norm_and_activation(block: Block) -> None:
    block.norm, block.act = block.act, block.norm


def replace_conv(**changes: object) -> Callable[[Block], None]:
    """An edit that gives the block's convolution other arguments."""

    def edit(block: Block) -> None:
        old = block.conv
        arguments = {"kernel_size": old.kernel_size, "padding": old.padding, **changes}
        block.conv = nn.Conv2d(old.in_channels, old.out_channels, **arguments)

    return edit


EDITS: dict[str, Callable[[Block], object]] = {
    "as it is": lambda block: None,
    "kernel 5": replace_conv(kernel_size=5, padding=2),
    "kernel 1": replace_conv(kernel_size=1, padding=0),
    "stride": replace_conv(stride=2),
    "reflect": replace_conv(padding_mode="reflect"),
    "no padding": replace_conv(padding=0),
    "padding same": replace_conv(padding="same"),
    "dilation": replace_conv(dilation=2, padding=2),
    "groups": lambda block: replace_conv(groups=math.gcd(block.conv.in_channels, 4))(block),
    "no bias": replace_conv(bias=False),
    "GroupNorm": lambda block: setattr(block, "norm", nn.GroupNorm(4, block.conv.out_channels)),
    "no norm": lambda block: setattr(block, "norm", nn.Identity()),
    "plain norm": lambda block: setattr(block, "norm", nn.BatchNorm2d(block.conv.out_channels, affine=False)),
    "cumulative": lambda block: setattr(block.norm, "momentum", None),
    "frozen norm": lambda block: block.norm.eval(),
    "no statistics": lambda block: setattr(
        block, "norm", nn.BatchNorm2d(block.conv.out_channels, track_running_stats=False)
    ),
    "another pool": lambda block: setattr(block, "pool", nn.MaxPool2d(3, 2, 1)),
    "ReLU": lambda block: setattr(block, "act", nn.ReLU()),
    "swapped": swap_norm_and_activation,
}


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_block_trains_what_plain_pytorch_does(edit: str, number: int) -> None:
    """Outputs, gradients and running statistics in training mode, against the plain layers in float64."""
    torch.manual_seed(number)
    block = Net(dropout=[0.0] * 4).blocks[number]
    EDITS[edit](block)
    for parameter in block.parameters():  # scales of both signs, among others
        nn.init.normal_(parameter)
    block.dropout = nn.Identity()
    side = (28, 14, 7, 7)[number]
    x = torch.rand(16, (1, 12, 24, 24)[number], side, side)
    block = block.train()
    if edit == "frozen norm":
        block.norm.eval()
    exact = copy.deepcopy(block).double()

    out = block(x)
    expected = exact.act(exact.pool(exact.norm(exact.conv(x.double()))))
    weights = torch.randn_like(expected)
    (out * weights.float()).sum().backward()
    (expected * weights).sum().backward()

    def close(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
        scale = theirs.abs().max().clamp(min=1)
        assert (ours - theirs).abs().max() <= tolerance * scale, name

    close("output", out, expected, 1e-4)
    largest = max(p.grad.abs().max() for p in exact.parameters() if p.grad is not None)  # a bias before a norm has 0
    for (name, ours), theirs in zip(block.named_parameters(), exact.parameters()):
        close(name, ours.grad / largest, theirs.grad / largest, 1e-4)
    for (name, ours), theirs in zip(block.named_buffers(), exact.buffers()):
        close(name, ours, theirs, 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_fire_on_every_layer(training: bool) -> None:
    model, calls = Net().train(training), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.add(name))
    model(torch.rand(8, 1, 28, 28))
    assert calls == {name for name, _ in model.named_modules()}


@pytest.mark.filterwarnings("ignore:Full backward hook")  # as the image needs no gradient
def test_backward_hooks_fire_on_every_layer() -> None:
    model, calls = Net(), set()
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda *_, name=name: calls.add(name))
    model(torch.rand(8, 1, 28, 28)).sum().backward()
    assert calls == {name for name, _ in model.named_modules()}


def test_the_shortcut_is_taken_once_in_training_and_never_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = network.patch_statistics
    monkeypatch.setattr(network, "patch_statistics", lambda x: (calls.append(x.shape), original(x))[1])
    model, x = Net(), torch.rand(8, 1, 28, 28)
    model.eval()(x)
    model.train()(x.clone().requires_grad_())
    assert calls == []
    with torch.no_grad():
        model(x)
    assert calls == [x.shape]


def test_a_pruned_first_convolution_learns() -> None:
    model = Net()
    torch.nn.utils.prune.l1_unstructured(model.blocks[0].conv, "weight", amount=0.5)
    for _ in range(2):
        model(torch.rand(8, 1, 28, 28)).sum().backward()
    assert model.blocks[0].conv.weight_orig.grad.abs().sum() > 0


def test_memory_format_changes_nothing() -> None:
    torch.manual_seed(0)
    model, x = Net(dropout=[0.0] * 4, fc_dropout=0.0), torch.randn(4, 1, 28, 28)
    expected = model(x)
    torch.testing.assert_close(utils.place(model, torch.device("cpu"))(x), expected, atol=1e-4, rtol=1e-4)


def test_scaled_dropout_reaches_every_layer() -> None:
    model, x = Net().train(), torch.randn(64, 1, 28, 28)
    model.scale_dropout(0.5)
    for layer in (m for m in model.modules() if isinstance(m, Dropout)):
        assert (layer(torch.ones(10_000)) == 0).double().mean() == pytest.approx(layer.p / 2, abs=0.02)
    model.scale_dropout(0)
    assert torch.equal(model(x), model(x))
