"""The network: its layer table, and that a block trains the function that it evaluates, whatever was edited."""

from __future__ import annotations

import copy
import math
import sys
from typing import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune
from conftest import CPU, mnist

import model as network
import train
import utils
from model import MAX_WIDTH, Block, Net, layer_table
from utils import Augmentation, Loader, Split


class Residual(nn.Module):
    """A block with a path around it."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.inner = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.norm = nn.BatchNorm2d(c_out)
        self.around = nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x)) + self.around(x)


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole image holds (Hu et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights(x)


def test_an_edited_network_has_a_table() -> None:
    model, number = Net(), len(Net().blocks) + 1
    model.blocks[1].conv = nn.Conv2d(12, 24, 3, padding=2, dilation=2)
    model.blocks[2].norm = nn.GroupNorm(4, 24)
    model.blocks.append(Block(12, 12, 3, nn.AvgPool2d(2), nn.ReLU(), 0.4))
    rows = {row.name: row for row in layer_table(model)}
    assert (rows["Conv2"].rf, rows["GroupNorm1"].parameters) == (4 + 4 * 2, (48,))
    assert (rows[f"Conv{number}"].parameters, rows["AvgPool1"].output_size) == ((1296, 12), (12, 3, 3))


def test_receptive_fields_end_where_the_network_is_no_chain(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    model.blocks[1] = nn.Sequential(model.blocks[1], SqueezeExcite(24))
    rows = layer_table(model)
    assert [row.rf for row in rows if row.name in ("Conv2", "Conv4")] == [8, None]  # Conv3 weighs the channels
    model = Net()
    model.blocks.insert(1, Residual(12, 12, stride=2))
    names = {row.name: row.rf for row in layer_table(model)}
    assert names["Conv2"] == 8 and names["Conv4"] is None
    monkeypatch.setattr(network, "Net", lambda: model)
    monkeypatch.setattr(sys, "argv", ["model.py"])
    network.main()
    assert "they follow no branches" in capsys.readouterr().out


def test_model_py_takes_no_flags(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["model.py", "--width", "4"])
    with pytest.raises(SystemExit, match="2"):
        network.main()
    assert "--width" in capsys.readouterr().err


@pytest.mark.parametrize("width", [0, MAX_WIDTH + 1])
def test_a_width_out_of_range_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"width {width}"):
        Net(width=width)


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
    compare_with_plain_pytorch(edit, number, seed=number)


def compare_with_plain_pytorch(edit: str, number: int, seed: int) -> None:
    """Outputs, gradients and running statistics in training mode, against the plain layers, without near ties."""
    torch.manual_seed(seed)
    block = Net(dropout=[0.0] * 4).blocks[number].double()
    side, c_in = (28, 14, 7, 7)[number], block.conv.in_channels
    EDITS[edit](block)
    block.double()
    for parameter in block.parameters():  # scales of both signs, among others
        nn.init.normal_(parameter)
    x = torch.rand(16, c_in, side, side, dtype=torch.float64)
    block = block.train()
    if edit == "frozen norm":
        block.norm.eval()
    plain = copy.deepcopy(block)

    out = block(x)
    expected = plain.act(plain.pool(plain.norm(plain.conv(x))))
    weights = torch.randn_like(expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)  # a bias before a norm has 0
    for (name, ours), theirs in zip(block.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad / largest, theirs.grad / largest, rtol=1e-9, atol=1e-9, msg=name)
    for ours, theirs in zip(block.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_float32_is_enough_for_the_statistics_of_patches() -> None:
    x = mnist(train=True).images[:64] / 255
    for ours, exact in zip(network.patch_statistics(x), network.patch_statistics(x.double())):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6)


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
    torch.testing.assert_close(utils.to_device(model, torch.device("cpu"))(x), expected, atol=1e-4, rtol=1e-4)


def test_dropout_falls_in_layers_of_any_kind_and_is_off_in_the_average() -> None:
    model = Net()
    model.blocks[2].dropout = nn.Dropout2d(0.3)
    rates = train.dropout_rates(model)
    assert len(rates) == len(model.blocks) + 1 and set(rates.values()) == {0.1, 0.2, 0.3, 0.4}
    train.set_dropout(rates, 0.5)
    assert [model.blocks[i].dropout.p for i in (0, 2)] == pytest.approx([0.05, 0.15])
    assert (model.blocks[0].dropout.train()(torch.ones(10_000)) == 0).double().mean() == pytest.approx(0.05, abs=0.01)
    digit = Split(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    run = train.build_run(train.Recipe(), CPU, data_crc=0, loader=Loader(digit, 64, Augmentation(), seed=0))
    x = torch.rand(64, 1, 28, 28)
    assert set(run.dropout.values()) == {0.1, 0.2, 0.3, 0.4}
    assert torch.equal(run.average.train()(x), run.average(x))
