"""model.py: the layer table of edited networks; extras/shortcut.py: block 1 trains what plain PyTorch does."""

import copy
import sys
from typing import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune
from conftest import CPU

import model as network
import train
from extras import shortcut
from model import Block, Net, layer_table
from utils import Split


class Weighted(nn.Sequential):
    """Channels times what these layers make of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * super().forward(x)


def test_an_edited_network_has_a_table(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Receptive fields end where it is no chain."""
    model, number = Net(), len(Net().blocks) + 2
    model.blocks[1].conv = nn.Conv2d(12, 24, 3, padding=2, dilation=2)
    model.blocks[2].norm = nn.GroupNorm(4, 24)
    model.blocks.insert(2, Weighted(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 24, 1)))
    model.blocks.append(Block(12, 12, 3, nn.AvgPool2d(2), nn.ReLU(), 0.4))
    rows = {row.name: row for row in layer_table(model)}
    assert (rows["Conv2"].rf, rows["GroupNorm1"].parameters) == (4 + 4 * 2, (48,))
    assert (rows[f"Conv{number}"].parameters, rows["AvgPool1"].output_size) == ((1296, 12), (12, 3, 3))
    assert rows["MaxPool2"].rf == 14 and rows["Conv4"].rf is rows[f"Conv{number}"].rf is None
    monkeypatch.setattr(network, "Net", lambda: model)
    monkeypatch.setattr(sys, "argv", ["model.py"])
    network.main()
    assert "not computed after a branch" in capsys.readouterr().out


class Swapped(Block):
    """Activation before normalisation, in an edited forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.pool(self.norm(self.act(self.conv(x)))))


def convolution(*arguments: object, **changes: object) -> Callable[[Block], None]:
    return lambda block: setattr(block, "conv", nn.Conv2d(1, 12, *arguments, **changes))


EDITS: dict[str, Callable[[Block], object]] = {
    "as it is": lambda block: None,
    "pruned later": lambda block: None,
    "kernel 5": convolution(5, padding=2),
    "reflect": convolution(3, padding=1, padding_mode="reflect"),
    "no bias": convolution(3, padding=1, bias=False),
    "dilation": convolution(3, padding=2, dilation=2),
    "GroupNorm": lambda block: setattr(block, "norm", nn.GroupNorm(4, 12)),
    "swapped": lambda block: setattr(block, "__class__", Swapped),
}


@pytest.mark.parametrize("edit", EDITS)
def test_block_1_trains_what_plain_pytorch_does(edit: str) -> None:
    torch.manual_seed(0)
    model, x = Net(dropout=[0.0] * 4), torch.rand(16, 1, 28, 28, dtype=torch.float64)
    EDITS[edit](model.blocks[0])
    for parameter in model.blocks[0].parameters():
        nn.init.normal_(parameter)  # scales of both signs, among others
    plain = copy.deepcopy(model.blocks[0]).double()
    shortcut.apply(model)
    block, results = model.blocks[0].double(), []
    assert ("forward" in vars(block.conv)) == (edit in ("as it is", "pruned later"))
    for module in (block, plain):
        if edit == "pruned later":
            torch.nn.utils.prune.l1_unstructured(module.conv, "weight", amount=0.5)
        out = module(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out)).sum().backward()
        statistics = [buffer for name, buffer in module.named_buffers() if "running" in name]
        results.append([out, *(p.grad for p in module.parameters()), *statistics, module.eval()(x)])
    largest = max(parameter.grad.abs().max() for parameter in plain.parameters())  # a bias before a norm has 0
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.double() / largest, theirs.double() / largest, rtol=1e-9, atol=1e-9)


def test_a_copy_of_a_network_with_the_shortcut_computes_with_its_own_weights() -> None:
    model, x = Net(), torch.rand(4, 1, 28, 28)
    shortcut.apply(model)
    block = copy.deepcopy(model).blocks[0]
    nn.init.zeros_(block.conv.weight)
    outputs = [block.norm(block.conv(x)) for block in (block.train(), block.eval())]
    assert [output.diff(dim=0).any().item() for output in outputs] == [False, False]


def test_dropout_falls_in_layers_of_any_kind_and_is_off_in_the_average() -> None:
    model = Net()
    model.blocks[2].dropout = nn.Dropout2d(0.3)
    rates = train.dropout_rates(model)
    assert len(rates) == len(model.blocks) + 1 and set(rates.values()) == {0.1, 0.2, 0.3, 0.4}
    train.set_dropout(rates, 0.5)
    assert [model.blocks[i].dropout.p for i in (0, 2)] == pytest.approx([0.05, 0.15])
    assert (model.blocks[0].dropout.train()(torch.ones(10_000)) == 0).double().mean() == pytest.approx(0.05, abs=0.01)
    digit = Split(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    run = train.build_run(train.Recipe(), digit, data_crc=0, device=CPU)
    x = torch.rand(64, 1, 28, 28)
    assert set(run.dropout.values()) == {0.1, 0.2, 0.3, 0.4}
    assert torch.equal(run.average.train()(x), run.average(x))
