"""README's "Change one thing": each edit in a copy of the repository, then all that follows."""

import ast
import json
import shutil
import subprocess
import sys
from typing import Callable, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import MAINS, ROOT, idx, mnist


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

# In one process: train, stop after an epoch and resume, measure, draw, export.
DRIVER = """
import contextlib, io, json, sys
from unittest import mock
import test_model, train, utils, visualize_errors

def call(module, *words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            utils.run_script(lambda: module.main(list(words)))
        except SystemExit as stop:
            return {"status": stop.code or 0, "out": out.getvalue(), "err": err.getvalue()}

visualize_errors.EXPLAINED = 1  # to save time
exports, *flags = sys.argv[1:]
results = {}
results["train"] = call(train, "--out", "whole", *flags)
with mock.patch.object(train, "print_epoch", side_effect=KeyboardInterrupt):
    results["stopped"] = call(train, "--out", "resumed", *flags)
results["resumed"] = call(train, "--resume", "--out", "resumed")
results["measured"] = call(test_model, "--checkpoint", "whole/model.pt")
results["drawn"] = call(visualize_errors, "--checkpoint", "whole/model.pt", "--split", "val")
for ending in exports.split():
    results[ending] = call(test_model, "--checkpoint", "whole", "--export", "network" + ending)
print(json.dumps(results))
"""


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
def test_one_edit_is_enough(name, call, environment, tiny, tmp_path):
    edit = EDITS[name]
    data_dir = write_other_data(tmp_path / "letters") if name == "data set" else tiny
    exports = (".onnx", ".html") if edit.file == "model.py" else ()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in (edit.readme or edit.new).splitlines():
        assert line.strip() in readme
    for script in (*MAINS, "model.py", "utils.py"):
        shutil.copy(ROOT / script, tmp_path)
    for folder in ("assets", "extras"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    text = (ROOT / edit.file).read_text(encoding="utf-8")
    start, end = edit.find(ast.parse(text))
    lines = text.splitlines(keepends=True)
    lines[start:end] = [edit.new]
    (tmp_path / edit.file).write_text("".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, " ".join(exports), *COMMON, *edit.flags],
        cwd=tmp_path, env={**environment, "MNIST_DATA_DIR": str(data_dir)},
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    statuses = [result["status"] for result in results.values()]
    assert statuses[:5] == [0, 130, 0, 0, 0], results

    def weights(out):
        return torch.load(tmp_path / out / "model.pt", weights_only=True)["model"]

    whole = weights("whole")
    for part, tensor in weights("resumed").items():
        assert torch.equal(tensor, whole[part]), part
    flags = () if name == "activation" else edit.flags  # which the unedited code does not know
    flags = (*flags, "--data-dir", tiny, "--out", tmp_path / "unedited")
    call("train.py", *COMMON, *flags)
    other = weights("unedited")
    same_layers = other.keys() == whole.keys()
    assert not (same_layers and torch.equal(other["fc1.bias"], whole["fc1.bias"]))
    assert len([*(tmp_path / "plots").glob("*.png")]) == 6 - bool(edit.missing), results["drawn"]
    assert f"{edit.missing}: not drawn, " in results["drawn"]["out"] or not edit.missing
    for ending, refusal in zip(exports, edit.refused):
        result = results[ending]
        if "needs the package" in result["err"]:
            refusal = "needs the package"
        assert result["status"] == (2 if refusal else 0), result
        assert (tmp_path / f"network{ending}").exists() != bool(refusal)
        assert not refusal or (refusal in result["err"] and result["err"].count("\n") == 1)
