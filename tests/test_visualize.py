"""visualize_errors.py: its pictures as a user gets them, what they show, and its mathematics by hand."""

import re
from itertools import combinations
from pathlib import Path
from typing import Callable
from unittest import mock

import matplotlib.style
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import utils
import visualize_errors as viz
from model import Net
from utils import Split
from visualize_errors import Predictions

PICTURES = ["errors.png", "confusion_matrix.png", "training_curves.png", "explain.png", "filters.png", "doubts.png"]


@pytest.fixture(autouse=True)
def style():
    with matplotlib.style.context(["default", viz.STYLE]):
        yield


@pytest.fixture(scope="module")
def net(trained: Path) -> Net:
    return utils.load_model(trained / "model.pt", CPU)[0]


@pytest.fixture(scope="module")
def predictions(net: Net, test_split: Split) -> Predictions:
    """What the trained network makes of the 1,000 test digits; it misreads a few dozen."""
    return viz.predict_all(net, test_split, "test")


def panels(figure: Figure) -> list:
    """The axes that show an image."""
    return [axis for axis in figure.axes if axis.images]


def pixels(axis: Axes) -> np.ndarray:
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


def test_as_a_user_types_it(run: Callable, trained: Path, predictions: Predictions, tmp_path: Path) -> None:
    """Whatever windows are set up: without --show none is needed."""
    out, windows = tmp_path / "new" / "plots", {"MPLBACKEND": "nonsense"}
    done = run("visualize_errors.py", "--checkpoint", trained / "model.pt", "--out", out, env=windows)
    assert_pictures(out, PICTURES)
    assert not done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(lines) == [str(out / name) for name in PICTURES]

    wrong = sum(a != b for a, b in zip(predictions.predicted.tolist(), predictions.split.labels.tolist()))
    metrics = utils.load_checkpoint(trained / "model.pt")["metrics"]
    errors, confusion, curves, explain, _, doubts = lines.values()
    assert errors == f"{wrong} of 1,000 test digits misread" and confusion.startswith(errors)
    assert curves == f"Test accuracy {metrics['test_accuracy']:.2%} and loss {metrics['test_loss']:.4f} after 3 epochs"
    assert f"8 of {wrong} mistakes" in explain
    assert doubts.endswith(errors)


def test_the_validation_images_mistakes(call: Callable, trained: Path, tmp_path: Path) -> None:
    """Of last.pt, as a training that still goes on leaves it; --show without a screen is a warning."""
    flags = ["--checkpoint", trained / "last.pt", "--split", "val", "--out", tmp_path, "--max", 10, "--show"]
    stdout, stderr = call("visualize_errors.py", *flags)
    last = utils.load_checkpoint(trained / "last.pt")["history"][-1]
    wrong = round(400 * (1 - last["val_accuracy"]))
    assert f"errors.png: {wrong} of 400 validation digits misread" in stdout
    assert f"Validation accuracy {last['val_accuracy']:.2%} and loss {last['val_loss']:.4f} after 3 epochs" in stdout
    assert "no window can be opened" in stderr and len(stderr.splitlines()) == 1
    assert Image.open(tmp_path / "errors.png").height < 400  # a single row


def test_own_images(call: Callable, trained: Path, predictions: Predictions, tmp_path: Path) -> None:
    """Test digits as scans: one with a name that would not fit, a number; and no image at all."""
    folder, out, digits = tmp_path / "scans", tmp_path / "plots", predictions.split.images[:, 0].numpy()
    scans = {"7/a.png": digits[0], f"b_$x$_{'and_on' * 20}.png": digits[1], "c.png": np.hstack([digits[0], digits[17]])}
    (folder / "7").mkdir(parents=True)
    for name, ink in scans.items():
        Image.fromarray(255 - ink).resize((10 * ink.shape[1], 280)).convert("RGB").save(folder / name)
    (folder / "broken.png").write_bytes(b"not an image")
    arguments = ["--checkpoint", trained / "model.pt", "--out", out, "--images", folder]
    with mock.patch.object(viz, "plot_images", wraps=viz.plot_images) as plot:
        _, stderr = call("visualize_errors.py", *arguments, status=1)
    assert_pictures(out, ["images.png"])
    assert "broken.png" in stderr and len(stderr.splitlines()) == 1
    assert "first 1 of 4 images" in call("visualize_errors.py", *arguments, "--max", 1)[0]

    figure = viz.plot_images(*plot.call_args.args)
    assert_legible(figure)
    panels, (digits, reports) = np.reshape(figure.axes, (-1, 3)), plot.call_args.args[1:]
    for (image, read, chart), name, its_digits, report in zip(panels, scans, digits, reports):
        assert image.get_title("left") and name.endswith(image.get_title("left")[-5:])
        assert read.get_title("left") == f"reads {report['number']}"
        assert np.array_equal(pixels(read), np.hstack([*its_digits]))
        least = min(report["digits"], key=lambda digit: digit["confidence"])
        assert [bar.get_height() for bar in chart.patches] == least["probabilities"]
    assert pixels(panels[2][1]).shape == (28, 56) and re.match("digit [12] of 2 ", panels[2][2].get_title("right"))


@pytest.mark.parametrize("limit", [3, 1000])
def test_errors_are_sorted_and_counted(predictions: Predictions, limit: int) -> None:
    assert viz.percent(torch.tensor(0.9992)) == "> 99.9%"  # and never 100
    figure = viz.plot_errors(predictions, limit)
    assert_legible(figure)
    wrong = [i for i in range(1000) if predictions.predicted[i] != predictions.split.labels[i]]
    wrong = sorted(wrong, key=lambda i: -predictions.probabilities[i].max())[:limit]
    assert len(panels(figure)) == len(wrong) > 0
    for axis, i in zip(panels(figure), wrong):
        label, answer, shares = predictions.split.labels[i], predictions.predicted[i], predictions.probabilities[i]
        assert axis.get_title("left") == f"{label} → {answer}"
        assert axis.get_title("right") == viz.percent(shares[answer])
        assert [text.get_text() for text in axis.texts] == [f"#{i}", f"{label}: {shares[label]:.1%}"]
        assert np.array_equal(pixels(axis), predictions.split.images[i, 0])


def test_confusion_matrix_counts_all_and_colours_the_mistakes(predictions: Predictions) -> None:
    figure = viz.plot_confusion(predictions)
    assert_legible(figure)
    counts, written = np.zeros((2, 10, 10), int)
    np.add.at(counts, (predictions.split.labels, predictions.predicted), 1)
    for text in figure.axes[0].texts:
        written[text.get_position()[::-1]] = text.get_text()
    assert np.array_equal(written, counts)
    coloured = figure.axes[0].images[0].get_array()
    assert np.array_equal(coloured.filled(0), counts - np.diag(counts.diagonal()))


def test_the_most_frequent_mistake_is_named_with_its_ties() -> None:
    for pairs, words in (
        ([(4, 9), (4, 9), (3, 5)], "4 as 9 (2)"),
        ([(4, 9), (3, 5)], "3 as 5 and 4 as 9 (1 each)"),
        ([(4, 9), (3, 5), (7, 2)], "3 as 5 and 2 other pairs (1 each)"),
    ):
        labels, answers = torch.tensor([*pairs, (1, 1)]).T
        digits = Split(torch.zeros(len(labels), 1, 28, 28), labels)
        figure = viz.plot_confusion(Predictions(digits, "test", F.one_hot(answers, 10).float()))
        assert figure.get_suptitle() == f"{len(pairs)} of {len(pairs) + 1} test digits misread, most often {words}"


def test_a_network_that_errs_nowhere(net: Net, predictions: Predictions) -> None:
    perfect = predictions._replace(probabilities=F.one_hot(predictions.split.labels, 10).float())
    assert viz.plot_confusion(perfect).get_suptitle() == "0 of 1,000 test digits misread"
    for figure in (viz.plot_errors(perfect, 50), viz.plot_explanations(net, perfect)):
        assert_legible(figure)
        assert not panels(figure)
    assert_legible(viz.plot_doubts(perfect))


@pytest.mark.parametrize(("epochs", "validated", "tested"), [(1, False, False), (1, False, True), (20, True, True)])
def test_training_curves(epochs: int, validated: bool, tested: bool) -> None:
    history = [
        {"epoch": i, "learning_rates": [0.1 / i, 0.1 / (i + 0.5), 0.1 / (i + 1)], "seconds": 3.0,
         "train_loss": 0.6 / i, "train_accuracy": 1 - 0.2 / i,
         **({"val_loss": 0.1 / i, "val_accuracy": 1 - 0.04 / i} if validated else {})}
        for i in range(1, epochs + 1)
    ]  # fmt: skip
    metrics = {"test_loss": 0.02, "test_accuracy": 0.995} if tested else {}
    figure = viz.plot_history(history, metrics)
    assert_legible(figure)
    rate, *others = figure.axes
    steps = [[i + part, 0.1 / (1 + i + part)] for i in range(epochs) for part in (0, 0.5, 1)]
    np.testing.assert_allclose(rate.lines[0].get_xydata(), steps)
    for axis, name in zip(others, ("loss", "accuracy")):
        curves = {line.get_label(): line.get_xydata() for line in axis.lines}

        def points(part: str, entries: list, name: str = name) -> list:
            values = [entry[f"{part}_{name}"] for entry in entries]
            return [[e["epoch"], v if name == "loss" else 100 * (1 - v)] for e, v in zip(entries, values)]

        expected = {"training: augmented images": points("train", history)}
        if validated:
            expected["validation"] = points("val", history)
        if tested:
            expected["test, after the last epoch"] = points("test", [{"epoch": epochs, **metrics}])
        assert {label: curve.tolist() for label, curve in curves.items()} == expected
        assert axis.get_yscale() == "log"
    part, accuracy = ("Test", 0.995) if tested else ("Training", 1 - 0.2 / epochs)
    assert figure.get_suptitle().startswith(f"{part} accuracy {accuracy:.2%} and loss ")


def test_explanations_show_both_digits(net: Net, predictions: Predictions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viz, "EXPLAINED", 4)
    figure = viz.plot_explanations(net, predictions)
    assert_legible(figure)
    assert len(panels(figure)) == 5 * 4
    second, shown = predictions.mistakes()[1], panels(figure)[5:10]
    true, predicted = predictions.split.labels[second], predictions.predicted[second]
    x = predictions.split.images[second, None] / 255
    assert np.array_equal(pixels(shown[0]), predictions.split.images[second, 0])
    methods = {"Grad-CAM": viz.grad_cam, "SmoothGrad": viz.smooth_grad}
    expected = {f"{name}: {d}": method(net, x, d) for name, method in methods.items() for d in (true, predicted)}
    assert [axis.get_title("left") for axis in shown[1:]] == list(expected)
    for axis, heat in zip(shown[1:], expected.values()):
        np.testing.assert_allclose(pixels(axis), heat, rtol=1e-4, atol=1e-6)


def test_filters_and_maps(net: Net, predictions: Predictions) -> None:
    shown = [pixels(axis) for axis in panels(viz.plot_filters(net, predictions))]
    assert len(shown) == 1 + 12 + sum(block.conv.out_channels for block in net.blocks)
    assert np.array_equal(shown[0], predictions.split.images[0, 0])
    assert np.array_equal(shown[1:13], net.blocks[0].conv.weight[:, 0].detach())
    last = net.blocks(predictions.split.images[:1] / 255)[0]
    np.testing.assert_allclose(shown[-12:], last.detach(), atol=1e-5)


def test_doubts_lie_between_the_answers(predictions: Predictions) -> None:
    """A point is the mean of ten places on a circle, weighted by the fourth roots of the probabilities."""
    figure = viz.plot_doubts(predictions)
    assert_legible(figure)
    (axis,) = figure.axes
    everything, mistakes, _, _ = (np.asarray(dots.get_offsets()) for dots in axis.collections)
    places = {text.get_text(): np.array(text.get_position()) for text in axis.texts}
    assert sorted(places) == list("0123456789")
    corners = np.array([places[str(digit)] for digit in range(10)])
    corners /= np.linalg.norm(corners, axis=1, keepdims=True)
    weights = predictions.probabilities.double().numpy() ** (1 / viz.TEMPERATURE)
    np.testing.assert_allclose(everything, weights / weights.sum(1, keepdims=True) @ corners, atol=1e-4)
    assert np.array_equal(everything[predictions.mistakes().numpy()], mistakes)


def test_what_a_network_cannot_have_is_one_line_and_no_old_picture_stays(call, trained, tmp_path, monkeypatch) -> None:
    """Here no convolution; then no blocks, whose filters are shown."""

    class Bare(nn.Module):
        blocks = nn.Sequential(nn.PixelUnshuffle(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x).mean((2, 3))[:, :10]

    convolution = nn.Sequential(nn.Conv2d(1, 12, 3, 2), nn.Flatten(), nn.Linear(12 * 13 * 13, 10))
    explain = {"explain.png": "no block has a convolution wider than 1x1"}
    checkpoint = utils.load_checkpoint(trained / "model.pt")
    for model, missing in ((Bare(), {**explain, "filters.png": "no convolution"}), (convolution, explain)):
        for name in PICTURES:
            (tmp_path / name).write_bytes(b"of another network")
        monkeypatch.setattr(utils, "load_model", lambda *_, model=model: (model, checkpoint))
        stdout, _ = call("visualize_errors.py", "--out", tmp_path)
        for name, line in zip(PICTURES, stdout.splitlines()):
            assert (": not drawn, " in line and missing.get(name, "") in line) == (name in missing), line
        assert_pictures(tmp_path, [name for name in PICTURES if name not in missing])


def test_grad_cam_by_hand_and_no_hook_is_left(net: Net, test_split: Split) -> None:
    """Selvaraju et al. (2017), equations 1 and 2, on the activated maps of the last 3x3 block, written out."""
    last = max(i for i, block in enumerate(net.blocks, 1) if block.conv.kernel_size == (3, 3))
    x = test_split.images[:1] / 255
    maps = net.blocks[:last](x).detach().requires_grad_()
    logits = net.fc2(net.act(net.fc1(net.pool(net.blocks[last:](maps)).flatten(1))))
    for digit in (2, 7):
        (gradients,) = torch.autograd.grad(logits[0, digit], maps, retain_graph=True)
        total = sum(gradients[0, k].sum() / 49 * maps[0, k].detach() for k in range(maps.shape[1]))
        expected = F.interpolate(total.clamp(min=0)[None, None], (28, 28), mode="bilinear")[0, 0]
        assert expected.max() > 0
        torch.testing.assert_close(viz.grad_cam(net, x, digit), expected, rtol=1e-4, atol=1e-6)

    assert not any(module._forward_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
