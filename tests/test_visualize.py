"""visualize_errors.py: its pictures as a user gets them, what they show, and its mathematics by hand."""

from __future__ import annotations

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
from test_network import Residual

import utils
import visualize_errors as viz
from model import Block, Net
from utils import Split, UserError
from visualize_errors import Predictions

PICTURES = ["errors.png", "confusion_matrix.png", "training_curves.png", "explain.png", "filters.png", "embedding.png"]


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
def predictions(net: Net, test_split: Split) -> Predictions:
    """What the trained network makes of the 1,000 test digits; it misreads a few dozen."""
    return viz.predict_all(net, test_split, "test")


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


def test_as_a_user_types_it(run: Callable, trained: Path, predictions: Predictions, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plots"
    done = run("visualize_errors.py", "--checkpoint", trained / "model.pt", "--out", out)
    assert_pictures(out, PICTURES)
    assert not done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(lines) == [str(out / name) for name in PICTURES]

    wrong = sum(a != b for a, b in zip(predictions.predicted.tolist(), predictions.split.labels.tolist()))
    metrics = utils.load_checkpoint(trained / "model.pt")["metrics"]
    errors, _, curves, explain, _, embedding = lines.values()
    assert errors == f"{wrong} of 1,000 test digits misread"
    assert curves == f"Test accuracy {metrics['test_accuracy']:.2f}% and loss {metrics['test_loss']:.4f} after 3 epochs"
    assert f"8 of {wrong} mistakes" in explain
    assert embedding.startswith(f"1,000 test digits, {wrong} of them misread")


def test_the_validation_images_mistakes(call: Callable, trained: Path, tmp_path: Path) -> None:
    """Of last.pt, as a training that still goes on leaves it; --show without a screen is a warning."""
    flags = ["--checkpoint", trained / "last.pt", "--split", "val", "--out", tmp_path, "--max", 10, "--show"]
    stdout, stderr = call("visualize_errors.py", *flags)
    last = utils.load_checkpoint(trained / "last.pt")["history"][-1]
    wrong = round(400 * (1 - last["val_accuracy"] / 100))
    assert f"errors.png: {wrong} of 400 validation digits misread" in stdout
    assert f"Validation accuracy {last['val_accuracy']:.2f}% and loss {last['val_loss']:.4f} after 3 epochs" in stdout
    assert "no window can be opened" in stderr and len(stderr.splitlines()) == 1
    with Image.open(tmp_path / "errors.png") as image:
        assert image.height < 400  # a single row


def test_bad_input_is_one_line(call: Callable, refuse: Callable, tmp_path: Path) -> None:
    out, missing = ["--out", tmp_path / "plots"], tmp_path / "none.pt"
    refuse("visualize_errors.py", "--checkpoint", missing, *out, words=[missing, "`python train.py`"])
    assert "--max" in call("visualize_errors.py", "--max", 0, *out, status=2)[1]
    assert not (tmp_path / "plots").exists()


def test_own_images(call: Callable, trained: Path, predictions: Predictions, tmp_path: Path) -> None:
    """Test digits as scans, two of one name, one with a name that would not fit, one misread; and no image at all."""
    folder, out = tmp_path / "scans", tmp_path / "plots"
    wrong = int(predictions.split.labels[0] + 1) % 10
    for digit, name in zip(predictions.split.images[:, 0], [f"{wrong}/a.png", f"b_$x$_{'and_on' * 20}.png", "c/a.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
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
    for axis, probabilities in zip(charts, plot.call_args.args[4]):
        assert [bar.get_height() for bar in axis.patches] == probabilities[0].tolist()
    best = torch.cat(plot.call_args.args[4]).argmax(1).tolist()
    captions = [f"{wrong} → {best[0]}", f"reads {best[1]}", f"reads {best[2]}"]
    assert [axis.get_title("left") for axis in charts] == captions
    names = [axis.get_title("left") for axis in figure.axes if axis.get_title("left").endswith(".png")]
    assert [names[0], names[2]] == [f"{wrong}/a.png", "c/a.png"] and names[1].startswith("…")

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
def test_errors_are_sorted_and_counted(predictions: Predictions, limit: int) -> None:
    figure = viz.plot_errors(predictions, limit)
    assert_legible(figure)
    wrong = [i for i in range(1000) if predictions.predicted[i] != predictions.split.labels[i]]
    wrong = sorted(wrong, key=lambda i: -predictions.confidence[i])[:limit]
    assert len(panels(figure)) == len(wrong) > 0
    for axis, i in zip(panels(figure), wrong):
        assert axis.get_title("left") == f"{predictions.split.labels[i]} → {predictions.predicted[i]}"
        assert axis.get_title("right") == f"{predictions.confidence[i]:.1%}"
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
    true, predicted = np.argwhere(coloured == coloured.max())[0]
    assert figure.get_suptitle().endswith(f", most often {true} as {predicted} ({coloured.max()})")


def test_a_network_that_errs_nowhere(net: Net, predictions: Predictions) -> None:
    perfect = predictions._replace(predicted=predictions.split.labels)
    assert viz.plot_confusion(perfect).get_suptitle() == "0 of 1,000 test digits misread"
    for figure in (viz.plot_errors(perfect, 50), viz.plot_explanations(net, perfect)):
        assert_legible(figure)
        assert not panels(figure)
    assert "0 of them misread" in viz.plot_embedding(net, perfect).get_suptitle()


@pytest.mark.parametrize(("epochs", "validated", "tested"), [(1, False, False), (1, False, True), (20, True, True)])
def test_training_curves(epochs: int, validated: bool, tested: bool) -> None:
    history = [
        {"epoch": i, "learning_rate": 0.1 / i, "dropout_factor": max(0, 1.5 - i / 2), "seconds": 3.0,
         "train_loss": 0.6 / i, "train_accuracy": 100 - 20 / i,
         **({"val_loss": 0.1 / i, "val_accuracy": 100 - 4 / i} if validated else {})}
        for i in range(1, epochs + 1)
    ]  # fmt: skip
    metrics = {"test_loss": 0.02, "test_accuracy": 99.5} if tested else {}
    figure = viz.plot_history(history, metrics)
    assert_legible(figure)
    rate, *others = figure.axes
    assert rate.lines[0].get_xydata().tolist() == [[e["epoch"], e["learning_rate"]] for e in history]
    for axis, name in zip(others, ("loss", "accuracy")):
        curves = {line.get_label(): line.get_xydata() for line in axis.lines}

        def points(part: str, entries: list, name: str = name) -> list:
            values = [entry[f"{part}_{name}"] for entry in entries]
            return [[e["epoch"], v if name == "loss" else 100 - v] for e, v in zip(entries, values)]

        thinned = "training: augmented, thinned by dropout"
        assert curves[thinned].tolist() == points("train", history[:2])
        assert axis.lines[0].get_xydata().tolist() == points("train", history)
        assert ("training: augmented, hard images more often" in curves) == (epochs > 2)
        assert ("validation" in curves) == validated
        if validated:
            assert curves["validation"].tolist() == points("val", history)
        if tested:
            expected = points("test", [{"epoch": epochs, **metrics}])
            assert curves["test, after the last epoch"].tolist() == expected
        low, high = axis.get_ylim()
        ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
        assert axis.get_yscale() == "log" and len(ticks) >= 3
    part = "Test" if tested else "Validation" if validated else "Training"
    assert figure.get_suptitle().startswith(f"{part} accuracy")


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


def test_embedding(net: Net, predictions: Predictions) -> None:
    logits = net(predictions.split.images[:100] / 255)
    features = viz.last_features(net, predictions.split.images[:100])
    torch.testing.assert_close(net.fc2(features), logits, rtol=1e-4, atol=1e-4)
    (axis,) = viz.plot_embedding(net, predictions).axes
    everything, mistakes = (np.asarray(dots.get_offsets()) for dots in axis.collections)
    assert np.array_equal(everything[predictions.mistakes()], mistakes)
    assert [text.get_text() for text in axis.texts] == list("0123456789")


def test_an_edited_network(test_split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another block, width, activation, pooling and normalisation; and a block with a path around it."""
    monkeypatch.setattr(viz, "EXPLAINED", 2)
    model = Net(width=3, activation="relu", adaptive_pool="avg")
    model.blocks.append(Block(36, 36, 5, nn.AvgPool2d(2), nn.ReLU(), 0.1))
    model.blocks[-1].norm = nn.GroupNorm(4, 36)
    model.blocks.append(Residual(36, 36))
    predictions = viz.predict_all(model.eval(), test_split.select(slice(50)), "test")
    viz.plot_embedding(model, predictions)
    assert_legible(viz.plot_explanations(model, predictions))
    figure = viz.plot_filters(model, predictions)
    assert_legible(figure)
    words = [axis.texts[0].get_text() for axis in figure.axes if axis.texts]
    assert words[-2:] == [f"block {len(model.blocks) + i}\n3x3\n24 of 36" for i in (-1, 0)]


def test_what_a_network_cannot_have_is_one_line_and_no_old_picture_stays(
    call: Callable, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here no convolution wider than 1x1, then none at all, and no linear layer; then no blocks."""

    class Bare(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x).mean((2, 3))[:, :10]

    convolution = nn.Sequential(nn.Conv2d(1, 12, 3, 2), nn.Flatten(), nn.Linear(12 * 13 * 13, 10))
    checkpoint = utils.load_checkpoint(trained / "model.pt")
    for model, missing in (
        (Bare(nn.Conv2d(1, 10, 1)), {"explain.png": "wider than 1x1", "embedding.png": "no linear layer"}),
        (Bare(nn.PixelUnshuffle(4)), {"explain.png": "wider than 1x1", "filters.png": "no convolution"}),
        (convolution, {"explain.png": "no self.blocks", "filters.png": "no self.blocks"}),
    ):
        for name in missing:
            (tmp_path / name).write_bytes(b"of another network")
        monkeypatch.setattr(utils, "load_model", lambda *_, model=model: (model, checkpoint))
        stdout, _ = call("visualize_errors.py", "--out", tmp_path)
        for name, words in missing.items():
            (line,) = [line for line in stdout.splitlines() if name in line]
            assert "not drawn" in line and words in line and not (tmp_path / name).exists()


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
