"""README's "Change one thing": each edit in a copy of the repository, then all that follows."""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, idx, mnist
from test_faults import interrupt


class Edit(NamedTuple):
    file: str
    find: Callable  # the lines to replace, from 0
    new: str
    flags: tuple = ()
    readme: str = ""  # README's words for it, if not `new`
    missing: str = ""  # a picture that is not drawn
    refused: tuple = ("", "")  # words of the refusals of the exports .onnx and .html


def named(tree, name):
    """The function, class or assignment of this name."""
    for node in ast.walk(tree):
        if name == getattr(node, "name", None):
            return node
        if isinstance(node, ast.Assign) and name == ast.unparse(node.targets[0]):
            return node


def definition(first, last=""):
    return lambda tree: (named(tree, first).lineno - 1, named(tree, last or first).end_lineno)


def first_line(function):
    return lambda tree: (named(tree, function).body[1].lineno - 1,) * 2


def first_return(function):
    return lambda tree: min(
        (node.lineno - 1, node.end_lineno)
        for node in ast.walk(named(tree, function))
        if isinstance(node, ast.Return)
    )


COMMON = ("--epochs", "2", "--batch-size", "32", "--val-size", "100")
ERASING = """\
    middle = torch.randint(28, (2, len(images), 1), generator=generator)  # row, column
    near = (torch.arange(28) - middle).abs() < 4
    images = images.masked_fill((near[0, :, :, None] & near[1, :, None, :]).unsqueeze(1), 0)
"""
ANOTHER_NET = """\
class Net(nn.Sequential):
    def __init__(self, **settings):
        conv = nn.Conv2d(1, 8, 5)
        super().__init__(conv, nn.MaxPool2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(288, 10))
"""
EDITS = {
    "block": Edit(
        "model.py", lambda tree: (named(tree, "self.blocks").value.args[-1].end_lineno,) * 2,
        "            Block(12 * width, 12 * width, 3, nn.Identity(), act(), p4),\n",
    ),
    "activation": Edit(
        "model.py", definition("ACTIVATIONS"),
        'ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}\n',
        ("--activation", "gelu"),
    ),
    "network": Edit(
        "model.py", definition("Net"), ANOTHER_NET,
        readme="def __init__(self, **settings)", missing="explain.png",
        refused=("", "cannot run this network"),
    ),
    "optimiser": Edit(
        "utils.py", first_line("make_optimizer"),
        "    return torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay)\n",
        ("--lr", "0.0002", "--peak-lr", "0.002"),
    ),
    "schedule": Edit(
        "utils.py", first_line("make_schedule"),
        "    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)\n",
        ("--lr", "0.05"),
    ),
    "augmentation": Edit("utils.py", first_line("augment"), ERASING),
    "loss": Edit(
        "train.py", first_return("make_loss"),
        "        return lambda logits, labels, images: "
        "F.cross_entropy(logits, labels, label_smoothing=0.1)\n",
    ),
    "data set": Edit(
        "model.py", definition("IMAGE_SIZE", "CLASS_NAMES"),
        "IMAGE_SIZE = 32\nCLASS_NAMES = [chr(33 + i) for i in range(47)]\n",
        readme="CLASS_NAMES = ",
        refused=("not exported", "it is for ten digits of 28x28"),
    ),
}

def write_other_data(folder):
    """32 x 32 pixels, labels up to 46."""
    folder.mkdir()
    for part, count in (("train", 640), ("t10k", 50)):
        split = mnist(train=part == "train").select(slice(count))
        images = F.pad(split.images[:, 0], [2] * 4)
        labels = split.labels + torch.arange(count) % 38
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images.numpy()))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels.numpy()))
    return folder


@pytest.mark.parametrize("name", EDITS)
def test_one_edit_is_enough(name, call, edit, tiny, tmp_path, monkeypatch):
    """It trains another network, resumes it, measures, draws and exports it."""
    change = EDITS[name]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in (change.readme or change.new).splitlines():
        assert line.strip() in readme
    monkeypatch.setenv("MNIST_DATA_DIR", str(tiny))
    flags = () if name == "activation" else change.flags  # which the unedited code does not know
    call("train.py", *COMMON, *flags, "--out", tmp_path / "unedited")
    if name == "data set":
        monkeypatch.setenv("MNIST_DATA_DIR", str(write_other_data(tmp_path / "letters")))
    text = (ROOT / change.file).read_text(encoding="utf-8")
    start, end = change.find(ast.parse(text))
    lines = text.splitlines(keepends=True)
    lines[start:end] = [change.new]
    edit(change.file, "".join(lines))

    call("train.py", *COMMON, *change.flags, "--out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["train"], "print_epoch", interrupt)
        call("train.py", *COMMON, *change.flags, "--out", "resumed", status=130)
    call("train.py", "--resume", "--out", "resumed")
    unedited, whole, resumed = (
        torch.load(Path(out) / "model.pt", weights_only=True)["model"]
        for out in ("unedited", "whole", "resumed")
    )
    for part, tensor in resumed.items():
        assert torch.equal(tensor, whole[part]), part
    same_layers = unedited.keys() == whole.keys()
    assert not (same_layers and torch.equal(unedited["fc1.bias"], whole["fc1.bias"]))

    call("test_model.py", "--checkpoint", "whole")
    monkeypatch.setattr(sys.modules["visualize_errors"], "EXPLAINED", 1)  # to save time
    out, _ = call("visualize_errors.py", "--checkpoint", "whole", "--split", "val")
    assert len([*Path("plots").glob("*.png")]) == 6 - bool(change.missing), out
    assert f"{change.missing}: not drawn, " in out or not change.missing
    exports = (".onnx", ".html") if change.file == "model.py" else ()
    for ending, refusal in zip(exports, change.refused):
        if ending == ".onnx" and not find_spec("onnxscript"):
            refusal = "ONNX needs packages"
        path = Path("network" + ending)
        flags = ("--checkpoint", "whole", "--export", path)
        _, err = call("test_model.py", *flags, status=2 if refusal else 0)
        assert path.exists() != bool(refusal)
        assert refusal in err and err.count("\n") == bool(refusal)
