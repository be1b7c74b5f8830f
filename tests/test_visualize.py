"""visualize_errors.py: its pictures as a user gets them, what they show, and its mathematics by hand."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Callable
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import utils
import visualize_errors as viz
from model import Block, Net
from utils import Split, UserError
from visualize_errors import Reading

PICTURES = ["errors.png", "confusion_matrix.png", "training_curves.png"]
EXPLANATIONS = ["explain.png", "filters.png", "embedding.png"]


@pytest.fixture(autouse=True)
def style():
    matplotlib.use("Agg")
    plt.style.use(["default", viz.STYLE])
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def net(trained: Path) -> Net:
    return utils.load_model(trained / "model.pt", CPU)[0]


@pytest.fixture(scope="module")
def reading(net: Net, test_split: Split) -> Reading:
    """What the trained network makes of the 1,000 test digits; it misreads a few dozen."""
    return viz.read(net, test_split)


def panels(figure: Figure) -> list:
    """The axes that show an image."""
    return [axis for axis in figure.axes if axis.images]


def pixels(axis: plt.Axes) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


def assert_pictures(out: Path, names: list[str]) -> None:
    """Exactly `names` are in `out`: PNG files of a sensible size that are not blank."""
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        with Image.open(out / name) as image:
            assert image.format == "PNG" and round(image.info["dpi"][0]) == 150
            assert 1000 <= image.width <= 2000 and 250 <= image.height <= 1500, (name, image.size)
            assert np.asarray(image.convert("L")).std() > 5


def assert_legible(figure: Figure) -> None:
    """No text overlaps another or a picture, or leaves the figure."""
    texts = []
    with mock.patch.object(Text, "draw", lambda text, _: texts.append(text)):
        figure.draw_without_rendering()
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 1
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert inside, f"{text!r} leaves the figure"
    for (a, first), (b, second) in combinations(boxes, 2):
        assert not first.padded(-0.5).overlaps(second.padded(-0.5)), f"{a!r} overlaps {b!r}"
    for text, (words, box) in zip(texts, boxes):
        others = [axis for axis in panels(figure) if axis is not text.axes]
        assert not any(axis.bbox.overlaps(box) for axis in others), f"{words!r} lies on a picture"


def test_as_a_user_types_it(run: Callable, trained: Path, reading: Reading, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plots"
    done = run("visualize_errors.py", "--explain", "--checkpoint", trained / "model.pt", "--out", out)
    assert_pictures(out, PICTURES + EXPLANATIONS)
    assert not done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(lines) == [str(out / name) for name in PICTURES + EXPLANATIONS]

    wrong = sum(a != b for a, b in zip(reading.predicted.tolist(), reading.split.labels.tolist()))
    last = json.loads((trained / "history.json").read_text())[-1]
    errors, _, curves, explain, _, embedding = lines.values()
    assert errors == f"{wrong} of 1,000 test digits misread"
    assert curves == f"Validation accuracy {last['val_accuracy']:.2f}% and loss {last['val_loss']:.4f} after epoch 3"
    assert f"8 of {wrong} mistakes" in explain
    assert embedding.startswith(f"1,000 test digits, {wrong} of them misread")


def test_curves_of_no_or_of_another_training_are_not_drawn(call: Callable, trained: Path, tmp_path: Path) -> None:
    checkpoint, out = shutil.copy(trained / "model.pt", tmp_path), tmp_path / "plots"
    arguments = ["--checkpoint", checkpoint, "--out", out, "--max", 10]
    stdout, stderr = call("visualize_errors.py", *arguments, "--show")
    assert_pictures(out, PICTURES[:2])
    assert f"skipped, there is no {tmp_path / 'history.json'}" in stdout
    assert "no window can be opened" in stderr and len(stderr.splitlines()) == 1
    with Image.open(out / "errors.png") as image:
        assert image.height < 400  # a single row

    history = json.loads((trained / "history.json").read_text())
    (tmp_path / "history.json").write_text(json.dumps(history[:1]))  # a second training that was stopped early
    stdout, _ = call("visualize_errors.py", *arguments)
    assert_pictures(out, PICTURES[:2])
    assert "history.json belongs to another training than model.pt" in stdout


def test_bad_input_is_one_line(call: Callable, refuse: Callable, trained: Path, tmp_path: Path) -> None:
    out, missing, history = ["--out", tmp_path / "plots"], tmp_path / "none.pt", tmp_path / "history.json"
    refuse("visualize_errors.py", "--checkpoint", missing, *out, words=[missing, "`python train.py`"])
    checkpoint = shutil.copy(trained / "model.pt", tmp_path)
    entry = '[{"epoch": 1, "learning_rate": 0.1, "train_accuracy": 9.0, "train_loss": '
    for text in ("", "[]", "{}", "3", "[1]", "\xff\xfe", '[{"epoch": 1}]', entry + "NaN}]", entry + '"low"}]'):
        history.write_bytes(text.encode("latin-1"))
        refuse("visualize_errors.py", "--checkpoint", checkpoint, *out, words=[f"{history} is damaged"])
    for flags in (["--max", 0], ["--images", "a.png", "--explain"]):
        assert flags[0] in call("visualize_errors.py", *flags, *out, status=2)[1]
    assert not (tmp_path / "plots").exists()


def test_own_images(call: Callable, trained: Path, reading: Reading, tmp_path: Path) -> None:
    """Three test digits as scans, one of which has a name that would not fit, and a file that is no image."""
    folder, out = tmp_path / "scans", tmp_path / "plots"
    folder.mkdir()
    for digit, name in zip(reading.split.images[:, 0], ["a.png", f"b_$x$_{'and_on' * 20}.png", "c.png"]):
        Image.fromarray(255 - digit.numpy()).resize((280, 280)).convert("RGB").save(folder / name)
    (folder / "broken.png").write_bytes(b"not an image")
    arguments = ["--checkpoint", trained / "model.pt", "--out", out, "--images", folder]
    with mock.patch.object(viz, "plot_images", wraps=viz.plot_images) as plot:
        _, stderr = call("visualize_errors.py", *arguments, status=1)
    assert_pictures(out, ["images.png"])
    assert "broken.png" in stderr and len(stderr.splitlines()) == 1

    figure = viz.plot_images(*plot.call_args.args)
    assert_legible(figure)
    charts = [axis for axis in figure.axes if axis.patches]
    assert len(charts) == 3
    for axis, probabilities in zip(charts, plot.call_args.args[3]):
        assert [bar.get_height() for bar in axis.patches] == probabilities.tolist()
        assert axis.get_title("left") == f"reads {probabilities.argmax()}"

    stdout, _ = call("visualize_errors.py", *arguments, "--max", 1)
    assert "first 1 of 4 images" in stdout


def test_a_failed_write_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(figure: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_disk)
    path = tmp_path / "errors.png"
    path.write_bytes(b"good")
    with pytest.raises(UserError, match="No space left"):
        viz.save(Figure(), path)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("limit", [3, 1000])
def test_errors_are_sorted_and_counted(reading: Reading, limit: int) -> None:
    figure = viz.plot_errors(reading, limit)
    assert_legible(figure)
    wrong = [i for i in range(1000) if reading.predicted[i] != reading.split.labels[i]]
    wrong = sorted(wrong, key=lambda i: -reading.confidence[i])[:limit]
    assert len(panels(figure)) == len(wrong) > 0
    for axis, i in zip(panels(figure), wrong):
        assert axis.get_title("left") == f"{reading.split.labels[i]} → {reading.predicted[i]}"
        assert axis.get_title("right") == f"{reading.confidence[i]:.1%}"
        assert np.array_equal(pixels(axis), reading.split.images[i, 0])


def test_confusion_matrix_counts_all_and_colours_the_mistakes(reading: Reading) -> None:
    figure = viz.plot_confusion(reading)
    assert_legible(figure)
    counts, written = np.zeros((2, 10, 10), int)
    np.add.at(counts, (reading.split.labels, reading.predicted), 1)
    for text in figure.axes[0].texts:
        written[text.get_position()[::-1]] = text.get_text()
    assert np.array_equal(written, counts)
    coloured = figure.axes[0].images[0].get_array()
    assert np.array_equal(coloured.filled(0), counts - np.diag(counts.diagonal()))
    true, predicted = np.argwhere(coloured == coloured.max())[0]
    assert figure.get_suptitle().endswith(f", most often {true} as {predicted} ({coloured.max()})")


def test_a_network_that_errs_nowhere(net: Net, reading: Reading) -> None:
    perfect = reading._replace(predicted=reading.split.labels)
    assert viz.plot_confusion(perfect).get_suptitle() == "0 of 1,000 test digits misread"
    for figure in (viz.plot_errors(perfect, 50), viz.plot_explanations(net, perfect)):
        assert_legible(figure)
        assert not panels(figure)
    assert "0 of them misread" in viz.plot_embedding(perfect).get_suptitle()


@pytest.mark.parametrize(("epochs", "validated"), [(1, False), (1, True), (20, True)])
def test_training_curves(epochs: int, validated: bool) -> None:
    history = [
        {"epoch": i, "learning_rate": 0.1 / i, "train_loss": 0.6 / i, "train_accuracy": 100 - 20 / i,
         **({"val_loss": 0.1 / i, "val_accuracy": 100.0} if validated else {})}
        for i in range(1, epochs + 1)
    ]  # fmt: skip
    figure = viz.plot_history(history)
    assert_legible(figure)
    names = [["learning_rate"], ["train_loss", "val_loss"], ["train_accuracy", "val_accuracy"]]
    for axis, curves in zip(figure.axes, names):
        drawn = [line.get_xydata().tolist() for line in axis.lines]
        assert drawn == [[[e["epoch"], e[name]] for e in history] for name in curves if name in history[0]]
    assert figure.get_suptitle().startswith("Validation" if validated else "Training")


def test_explanations_show_both_digits(net: Net, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viz, "EXPLAINED", 4)
    figure = viz.plot_explanations(net, reading)
    assert_legible(figure)
    assert len(panels(figure)) == 5 * 4
    second, shown = reading.mistakes()[1], panels(figure)[5:10]
    true, predicted = reading.split.labels[second], reading.predicted[second]
    x = utils.normalize(reading.split.images[second, None] / 255)
    assert np.array_equal(pixels(shown[0]), reading.split.images[second, 0])
    methods = {"Grad-CAM": viz.grad_cam, "SmoothGrad": viz.smooth_grad}
    expected = {f"{name}: {d}": method(net, x, d) for name, method in methods.items() for d in (true, predicted)}
    assert [axis.get_title("left") for axis in shown[1:]] == list(expected)
    for axis, heat in zip(shown[1:], expected.values()):
        np.testing.assert_allclose(pixels(axis), heat, rtol=1e-4, atol=1e-6)


def test_filters_and_maps(net: Net, reading: Reading) -> None:
    shown = [pixels(axis) for axis in panels(viz.plot_filters(net, reading))]
    assert len(shown) == 1 + 12 + 12 + 24 + 24 + 12
    assert np.array_equal(shown[0], reading.split.images[0, 0])
    assert np.array_equal(shown[1:13], net.blocks[0].conv.weight[:, 0].detach())
    last = net.blocks(utils.normalize(reading.split.images[:1] / 255))[0]
    np.testing.assert_allclose(shown[-12:], last.detach(), atol=1e-5)


def test_embedding(net: Net, reading: Reading) -> None:
    logits = net(utils.normalize(reading.split.images[:100] / 255))
    torch.testing.assert_close(net.fc2(reading.features[:100]), logits, rtol=1e-4, atol=1e-4)
    (axis,) = viz.plot_embedding(reading).axes
    everything, mistakes = (np.asarray(dots.get_offsets()) for dots in axis.collections)
    assert np.array_equal(everything[reading.mistakes()], mistakes)
    assert [text.get_text() for text in axis.texts] == list("0123456789")


def test_an_edited_network(test_split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth block, another width, activation, pooling and normalisation."""
    monkeypatch.setattr(viz, "EXPLAINED", 2)
    model = Net(width=3, activation="relu", adaptive_pool="avg")
    model.blocks.append(Block(36, 36, 5, nn.AvgPool2d(2), nn.ReLU(), 0.1))
    model.blocks[4].norm = nn.GroupNorm(4, 36)
    reading = viz.read(model.eval(), test_split.select(slice(50)))
    viz.plot_embedding(reading)
    assert_legible(viz.plot_explanations(model, reading))
    figure = viz.plot_filters(model, reading)
    assert_legible(figure)
    words = [axis.texts[0].get_text() for axis in figure.axes if axis.texts]
    assert words[-1] == "block 5\n3x3\n24 of 36"


def test_grad_cam_by_hand_and_no_hook_is_left(net: Net, test_split: Split) -> None:
    """Selvaraju et al. (2017), equations 1 and 2, on the activated maps of the third block, written out."""
    x = utils.normalize(test_split.images[:1] / 255)
    maps = net.blocks[:3](x).detach().requires_grad_()
    logits = net.fc2(net.act(net.fc1(net.pool(net.blocks[3](maps)).flatten(1))))
    for digit in (2, 7):
        (gradients,) = torch.autograd.grad(logits[0, digit], maps, retain_graph=True)
        total = sum(gradients[0, k].sum() / 49 * maps[0, k].detach() for k in range(24))
        expected = F.interpolate(total.clamp(min=0)[None, None], (28, 28), mode="bilinear")[0, 0]
        assert expected.max() > 0
        torch.testing.assert_close(viz.grad_cam(net, x, digit), expected, rtol=1e-4, atol=1e-6)

    with pytest.raises(RuntimeError):
        viz.grad_cam(net, torch.rand(1, 2, 28, 28), 3)  # two channels
    assert not any(module._forward_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_smooth_grad_of_a_quadratic_model() -> None:
    """The gradient is 2x, so the result is 2 |x + mean noise|: the noise's size and number can be read off it."""

    class Quadratic(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x**2).flatten(1).sum(1, keepdim=True).expand(-1, 10)

    x = 3 * torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    noise = viz.smooth_grad(Quadratic(), x + 10, 3, samples=25, noise=0.5) / 2 - (x[0, 0] + 10)
    assert noise.std().item() == pytest.approx(0.5 * float(x.max() - x.min()) / 5, rel=0.1)
    clean = viz.smooth_grad(Quadratic(), x - 1.5, 3, samples=1000, noise=0.1) / 2
    torch.testing.assert_close(clean, (x[0, 0] - 1.5).abs(), rtol=0, atol=0.06)


def test_pca_diagonalises_the_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 3.0]) + 7
    points, shares = viz.pca(features)
    variances = np.sort(np.linalg.eigvalsh(np.cov(features.numpy().T)))[::-1]
    np.testing.assert_allclose(np.cov(points.numpy().T), np.diag(variances[:2]), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(shares, variances[:2] / variances.sum(), rtol=1e-4)
