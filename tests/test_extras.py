"""Folders, compare, benchmark, figures."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, mnist
from PIL import Image

import utils
from extras import compare, figures, folders
from utils import Split, UserError


def write_pictures(folder: Path, split: Split) -> None:
    """As FOLDER/LABEL/NUMBER.png."""
    for i, (image, label) in enumerate(zip(split.images.numpy(), split.labels.tolist())):
        path = folder / str(label) / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 of MNIST's digits."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "train", mnist(train=True).select(slice(1500)))
    write_pictures(folder / "testing", mnist(train=False).select(slice(500)))
    return folder


@pytest.mark.parametrize("train, count", [(True, 1500), (False, 500)])
def test_pictures_are_read_by_class_then_by_name(pictures, train, count):
    split = utils.load_mnist(pictures, train, CPU)
    expected = mnist(train=train).select(slice(count))
    expected = expected.select(expected.labels.argsort(stable=True))
    torch.testing.assert_close(split.images, expected.images)
    torch.testing.assert_close(split.labels, expected.labels)
    assert utils.checksum(split) == utils.checksum(expected)


def test_pictures_train_and_measure(call, pictures, tmp_path):
    data = ("--data-dir", pictures)
    call("train.py", "--epochs", 1, "--val-size", 300, "--out", tmp_path, *data)
    for split, count in (("val", 300), ("test", 500)):
        out, _ = call("test_model.py", "--checkpoint", tmp_path, "--split", split, *data)
        assert f"in {count})" in out


def test_labels_are_in_numeric_order_and_common_to_both(tmp_path):
    digits = mnist(train=True).select(slice(3))
    write_pictures(tmp_path / "training", Split(digits.images, torch.tensor([10, 9, 2])))
    write_pictures(tmp_path / "test", Split(digits.images[:1], torch.tensor([10])))
    assert folders.class_names(tmp_path) == ["2", "9", "10"]
    assert folders.load(tmp_path, train=False)[1].tolist() == [2]


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
def settings(trained: Path, tmp_path: Path) -> list[str]:
    """Two folders of three runs; the second's are 1, 2, 3 points better."""
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
    path = Path(settings[1]) / "seed-2" / "model.pt"
    checkpoint = torch.load(path)
    recipe = {**checkpoint["recipe"], "train_size": 500}
    changes = {"another train_size": {"recipe": recipe}, "with --val-size": {"metrics": {}}}
    for words, change in changes.items():
        torch.save({**checkpoint, **change}, path)
        with pytest.raises(UserError, match=words):
            compare.main(settings)
    with pytest.raises(UserError, match="fewer than two seeds"):
        compare.main([settings[0], str(path)])


@pytest.mark.parametrize("name", ["accuracy", "size"])
def test_figures_are_drawn_and_told(name, tmp_path, monkeypatch, capsys):
    accuracies = 99 + np.random.rand(5, 2) / 2
    monkeypatch.setattr(figures, "train", lambda *_: (14.0, accuracies))
    monkeypatch.setattr(figures, "train_the_plain_way", lambda name, seed: (700.0, 99 + seed / 9))
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", name])
    figures.main()
    *table, _, _ = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in table} == {10}
    assert Image.open(tmp_path / "assets" / f"{name}.png").width > 1000
