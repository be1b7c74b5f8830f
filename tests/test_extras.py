"""Folders, compare, figures."""

import sys

import numpy as np
import pytest
import torch
from conftest import CPU, mnist
from PIL import Image

import utils
from extras import compare, figures, folders
from utils import Split, UserError


def write_pictures(folder, split):
    for i, (image, label) in enumerate(zip(split.images.numpy(), split.labels.tolist())):
        path = folder / str(label) / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)


def test_pictures_are_read_by_class_then_by_name(tmp_path):
    for folder, is_train in (("train", True), ("testing", False)):
        digits = mnist(train=is_train).select(slice(500))
        write_pictures(tmp_path / folder, digits)
        expected = digits.select(digits.labels.argsort(stable=True))
        found = utils.load_mnist(tmp_path, is_train, CPU)
        assert utils.checksum(found) == utils.checksum(expected)


def test_labels_are_in_numeric_order_and_common_to_both(tmp_path):
    digits = mnist(train=True).select(slice(3))
    write_pictures(tmp_path / "training", Split(digits.images, torch.tensor([10, 9, 2])))
    write_pictures(tmp_path / "test", Split(digits.images, torch.tensor([10, 10, 10])))
    assert folders.class_names(tmp_path) == ["2", "9", "10"]
    assert folders.load(tmp_path, train=False)[1].tolist() == [2, 2, 2]


def test_pictures_that_do_not_fit_are_named(refuse, tmp_path):
    write_pictures(tmp_path / "train", mnist(train=True).select(slice(20)))
    command = ("train.py", "--data-dir", tmp_path, "--out", tmp_path / "out")
    refuse(*command, words=["no test pictures"])
    path = tmp_path / "train" / "5" / "zz.png"
    Image.new("L", (28, 29)).save(path)
    refuse(*command, words=[path, "28 x 28"])
    path.write_bytes(b"no picture")
    refuse(*command, words=["cannot read", path])
    (tmp_path / "train" / "another").mkdir()
    refuse(*command, words=["11 classes", "CLASS_NAMES"])


@pytest.fixture
def settings(trained, tmp_path):
    """Two folders of three runs; the second's are 1 to 3 points better."""
    checkpoint = torch.load(trained / "model.pt")
    for setting in range(2):
        for seed in range(3):
            gain = setting * (seed + 1) / 100
            metrics = {k: v + gain * ("acc" in k) for k, v in checkpoint["metrics"].items()}
            path = tmp_path / str(setting) / f"seed-{seed}" / "model.pt"
            path.parent.mkdir(parents=True)
            torch.save({**checkpoint, "metrics": metrics}, path)
    return [str(tmp_path / "0"), str(tmp_path / "1")]


def test_settings_are_compared_in_pairs(settings, capsys):
    compare.main(settings)
    head, *lines, loss = capsys.readouterr().out.splitlines()
    assert head.startswith("3 pairs") and len(lines) == 2
    assert all(line.endswith("+2.000% ± 0.577%") for line in lines)
    assert loss.endswith("+0.00000 ± 0.00000  no difference")
    compare.main([*settings, "--test"])
    assert "Test, nine looks" in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_refused(settings):
    path = f"{settings[1]}/seed-2/model.pt"
    checkpoint = torch.load(path)
    recipe = {**checkpoint["recipe"], "train_size": 500}
    changes = {"another train_size": {"recipe": recipe}, "with --val-size": {"metrics": {}}}
    for words, change in changes.items():
        torch.save({**checkpoint, **change}, path)
        with pytest.raises(UserError, match=words):
            compare.main(settings)
    with pytest.raises(UserError, match="fewer than two seeds"):
        compare.main([settings[0], path])


def test_figure_is_drawn_and_told(tmp_path, monkeypatch, capsys):
    accuracies = 99 + np.random.rand(5, 2) / 2
    monkeypatch.setattr(figures, "train", lambda *_: (14.0, accuracies))
    monkeypatch.setattr(figures, "train_the_plain_way", lambda name, seed: (700.0, 99 + seed / 9))
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", "accuracy"])
    figures.main()
    *table, _, _ = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in table} == {10}
    assert Image.open(tmp_path / "assets" / "accuracy.png").width > 1000
