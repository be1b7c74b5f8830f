"""README's "Change one thing": each edit as text in a copy of the repository, then everything that people do next."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, idx, mnist

SCRIPTS = ("model.py", "train.py", "test_model.py", "visualize_errors.py", "utils.py")


class Edit(NamedTuple):
    """`old` becomes `new`, whose lines README has; `refused` exports, with words of the refusal."""

    file: str
    old: str
    new: str
    flags: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()


COMMON = ("--batch-size", "16", "--val-size", "100")
FIFTH_BLOCK = "            Block(12 * width, 12 * width, 3, nn.Identity(), act(), p4),\n"
ERASING = """\
    near = (torch.arange(28) - torch.randint(28, (2, len(images), 1), generator=generator)).abs() < 4  # rows, columns
    images = images.masked_fill((near[0, :, :, None] & near[1, :, None, :]).unsqueeze(1), 0)
"""
EDITS = {
    "block": Edit("model.py", "        )\n        self.pool", f"{FIFTH_BLOCK}        )\n        self.pool"),
    "activation": Edit(
        "model.py", 'ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}',
        'ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}', ("--activation", "gelu"),
    ),
    "optimiser": Edit(
        "utils.py", "    return torch.optim.SGD(",
        "    return torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay)\n    return torch.optim.SGD(",
        ("--lr", "0.0002", "--peak-lr", "0.002"),
    ),
    "schedule": Edit(
        "utils.py", "    # OneCycleLR counts",
        "    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)\n    # OneCycleLR counts",
    ),
    "augmentation": Edit(
        "utils.py", "    matrices, displacements = augmentation.sample(len(images), generator)\n",
        f"{ERASING}    matrices, displacements = augmentation.sample(len(images), generator)\n",
    ),
    "loss": Edit(
        "train.py", "        return lambda logits, labels, images: F.cross_entropy(logits, labels)\n",
        "        return lambda logits, labels, images: F.cross_entropy(logits, labels, label_smoothing=0.1)\n",
    ),
    "data set": Edit(
        "model.py", "IMAGE_SIZE = 28  # pixels a side\nCLASSES = 10\n", "IMAGE_SIZE = 32\nCLASSES = 26\n",
        refused=((".onnx", "ONNX has no adaptive max pooling"), (".html", "it is for ten digits of 28x28")),
    ),
}  # fmt: skip

# In the copy, in one process: train, stop after an epoch and resume, measure, draw, export. Prints what came of it.
DRIVER = """
import contextlib, io, json, sys
import test_model, train, utils, visualize_errors

def call(module, *words):
    sys.argv = [module.__file__, *words]
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = lambda **_: None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            utils.run_script(module.main)
        except SystemExit as stop:
            return {"status": stop.code or 0, "out": out.getvalue(), "err": err.getvalue()}

flags, results = sys.argv[1:], {}
results["train"] = call(train, "--epochs", "2", "--out", "whole", *flags)
print_epoch = train.print_epoch

def stop(entry):
    raise KeyboardInterrupt

train.print_epoch = stop
results["stopped"] = call(train, "--epochs", "2", "--out", "resumed", *flags)
train.print_epoch = print_epoch
results["resumed"] = call(train, "--resume", "--out", "resumed")
results["measured"] = call(test_model, "--checkpoint", "whole/model.pt")
results["drawn"] = call(visualize_errors, "--checkpoint", "whole/model.pt", "--split", "val")
for ending in (".onnx", ".html"):
    results[ending] = call(test_model, "--checkpoint", "whole/model.pt", "--export", "network" + ending)
print(json.dumps(results))
"""


def write_other_data(folder: Path) -> None:
    """Digits in 32 x 32 pixels, with labels up to 25."""
    folder.mkdir()
    for part, count in (("train", 640), ("t10k", 50)):
        split = mnist(train=part == "train").select(slice(count))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(F.pad(split.images[:, 0], [2] * 4).numpy()))
        labels = (split.labels + 10 * (torch.arange(count) % 3)).clamp(max=25)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels.numpy()))


@pytest.mark.parametrize("name", EDITS)
def test_one_edit_is_enough(name: str, call: Callable, environment: dict, tiny: Path, tmp_path: Path) -> None:
    edit, data_dir = EDITS[name], tiny
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in set(edit.new.splitlines()) - set(edit.old.splitlines()):
        assert line.strip() in readme
    for script in SCRIPTS:
        text = (ROOT / script).read_text(encoding="utf-8")
        if script == edit.file:
            assert text.count(edit.old) == 1
            text = text.replace(edit.old, edit.new)
        (tmp_path / script).write_text(text, encoding="utf-8")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    if name == "data set":
        write_other_data(data_dir := tmp_path / "letters")

    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *COMMON, *edit.flags],
        cwd=tmp_path, env={**environment, "MNIST_DATA_DIR": str(data_dir)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for step, status in {"train": 0, "stopped": 130, "resumed": 0, "measured": 0, "drawn": 0}.items():
        assert results[step]["status"] == status, results[step]
    whole, resumed = (torch.load(tmp_path / out / "model.pt", weights_only=True) for out in ("whole", "resumed"))
    for part, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][part]), part
    flags = () if name == "activation" else edit.flags  # which the unedited code does not know
    call("train.py", "--epochs", 2, *COMMON, *flags, "--data-dir", tiny, "--out", tmp_path / "unedited")
    unedited = torch.load(tmp_path / "unedited" / "model.pt", weights_only=True)["model"]
    assert unedited.keys() != whole["model"].keys() or not torch.equal(unedited["fc1.bias"], whole["model"]["fc1.bias"])
    assert len(list((tmp_path / "plots").glob("*.png"))) == 6, results["drawn"]
    for ending in (".onnx", ".html"):
        if ending == ".onnx" and "needs the package" in results[ending]["err"]:
            continue
        if words := dict(edit.refused).get(ending):
            assert results[ending]["status"] == 2 and words in results[ending]["err"]
            assert results[ending]["err"].count("\n") == 1 and not (tmp_path / f"network{ending}").exists()
        else:
            assert results[ending]["status"] == 0, results[ending]
            assert (tmp_path / f"network{ending}").exists()
