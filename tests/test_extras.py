"""Folders, compare, figures."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, mnist
from PIL import Image

import utils
from extras import figures, folders
from utils import Split


def write_pictures(folder, split):
    for i, (image, label) in enumerate(zip(split.images.numpy(), split.labels.tolist())):
        path = folder / str(label) / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)


def test_pictures_are_read_by_class_then_by_name_and_trained_on(call, tmp_path):
    for folder, is_train in (("train", True), ("test", False)):
        digits = mnist(train=is_train).select(slice(500))
        write_pictures(tmp_path / folder, digits)
        expected = digits.select(digits.labels.argsort(stable=True))
        found = utils.load_mnist(tmp_path, is_train, CPU)
        assert utils.checksum(found) == utils.checksum(expected)
    assert "Final Test Accuracy" in call("train.py", "--dry-run", "--data-dir", tmp_path)[0]


def test_labels_are_in_numeric_order_and_common_to_both(tmp_path):
    digits = mnist(train=True).select(slice(3))
    write_pictures(tmp_path / "train", Split(digits.images, torch.tensor([10, 9, 2])))
    write_pictures(tmp_path / "test", Split(digits.images, torch.tensor([10, 10, 10])))
    assert folders.class_names(tmp_path) == ["2", "9", "10"]
    assert folders.load(tmp_path, train=False)[1].tolist() == [2, 2, 2]


def test_pictures_that_do_not_fit_are_named(refuse, tmp_path):
    write_pictures(tmp_path / "train", mnist(train=True).select(slice(20)))
    command = ("train.py", "--data-dir", tmp_path, "--out", tmp_path / "out")
    refuse(*command, words=[tmp_path / "test", "no pictures"])
    path = tmp_path / "train" / "5" / "zz.png"
    Image.new("L", (28, 29)).save(path)
    refuse(*command, words=[path, "28 x 28"])
    path.write_bytes(b"no picture")
    refuse(*command, words=["cannot read", path])
    (tmp_path / "train" / "another").mkdir()
    refuse(*command, words=["11 classes", "CLASS_NAMES"])


def test_readmes_lines_compare_two_settings_in_pairs(tmp_path, monkeypatch, capsys):
    for name, gains in (("before", (0, 0, 0)), ("after", (1, 2, 3))):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        runs = [{"val_accuracy": (99 + gain) / 100} for gain in gains]
        (folder / "runs.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(import json, .*?)```", readme, re.DOTALL)
    exec(lines, {})
    assert capsys.readouterr().out == "+2.000% ± 0.577%\n"


@pytest.mark.parametrize("name", ["accuracy", "size"])
def test_figure_is_drawn_and_told(name, tmp_path, monkeypatch, capsys):
    accuracies = 99 + np.random.rand(5, 2) / 2
    monkeypatch.setattr(figures, "train", lambda *_: (14.0, accuracies))
    monkeypatch.setattr(figures, "train_the_plain_way", lambda name, seed: (700.0, 99 + seed / 9))
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", name])
    figures.main()
    *table, _, _ = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in table} == {10}
    assert Image.open(tmp_path / "assets" / f"{name}.png").width > 1000
