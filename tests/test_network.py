"""model.py: the layer table of edited networks, and what a checkpoint is loaded as."""

import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import CPU, ROOT

import train
import utils
from model import Block, Net, layer_table, load_pretrained
from utils import Split


class Weighted(nn.Sequential):
    """Channels times what these layers make of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * super().forward(x)


def test_an_edited_network_has_a_table():
    """Receptive fields end where it is no chain; modes and hooks are as before."""
    model = Net()
    number = len(model.blocks) + 2
    model.blocks[1].conv = nn.Conv2d(12, 24, 3, padding=2, dilation=2)
    model.blocks[2].norm = nn.GroupNorm(4, 24)
    model.blocks.insert(2, Weighted(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 24, 1)))
    model.blocks.append(Block(12, 12, 3, nn.AvgPool2d(2), nn.ReLU(), 0.4))
    model.blocks[0].norm.eval()  # such as a frozen layer
    rows = {row.name: row for row in layer_table(model)}
    assert rows["Conv2"].receptive_field == 4 + 4 * 2 and rows["MaxPool2"].receptive_field == 14
    assert rows["GroupNorm1"].parameters == (48,)
    assert rows[f"Conv{number}"].parameters == (1296, 12)
    assert rows["AvgPool1"].output_size == (12, 3, 3)
    assert rows["Conv4"].receptive_field is rows[f"Conv{number}"].receptive_field is None
    assert model.training and not model.blocks[0].norm.training
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_falls_in_each_layer_and_is_off_in_the_average():
    model = Net()
    model.blocks[2].dropout = nn.Dropout2d(0.3)
    rates = train.find_dropout(model)
    assert len(rates) == len(model.blocks) + 1 and set(rates.values()) == {0.1, 0.2, 0.3, 0.4}
    train.set_dropout(rates, 0.5)
    assert [model.blocks[i].dropout.p for i in (0, 2)] == pytest.approx([0.05, 0.15])
    dropped = model.blocks[0].dropout.train()(torch.ones(10_000)) == 0
    assert dropped.double().mean() == pytest.approx(0.05, abs=0.01)
    digit = Split(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    run = train.build_run(train.parse_args([])[1], digit, data_crc=0, device=CPU)
    x = torch.rand(64, 1, 28, 28)
    assert set(run.dropout_rates.values()) == {0.1, 0.2, 0.3, 0.4}
    assert torch.equal(run.average.train()(x), run.average(x))


def test_a_checkpoint_of_your_own_is_loaded_in_your_own_program(trained, tmp_path):
    """README's lines, in a folder that has a utils.py of its own."""
    (tmp_path / "utils.py").write_text("raise SystemExit('the wrong utils')")
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from model import load_pretrained
import utils
print(load_pretrained({str(trained / "model.pt")!r}).fc2.bias.sum().item())
model, checkpoint = utils.load_model({str(trained)!r}, "cpu")
print(model.fc2.bias.sum().item())
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = str(utils.load_model(trained, CPU)[0].fc2.bias.sum().item())
    assert done.stdout.split() == [expected, expected]
    assert not load_pretrained(str(trained / "model.pt")).training


DOUBLED = "    def forward(self, x: Tensor) -> Tensor:\n        x = 2 * x\n"

def test_an_edited_forward_of_the_same_weights_is_refused(refuse, edit, trained, unfinished):
    """It would measure nonsense, and --resume would go on with another network."""
    text = (ROOT / "model.py").read_text(encoding="utf-8")
    before, _, _ = DOUBLED.partition("        ")
    edit("model.py", text.replace(before, DOUBLED, 1))
    words = ["model.py computes something else than the network that wrote"]
    refuse("test_model.py", "--checkpoint", trained, words=words)
    refuse("train.py", "--resume", "--out", unfinished, words=words)
