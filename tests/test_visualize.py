"""visualize_errors.py: its pictures through the command line, its mathematics by hand."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Callable
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from synthetic_mnist import write_idx

import utils
import visualize_errors as viz
from model import Net
from utils import Split, UserError

matplotlib.use("Agg")
CPU = torch.device("cpu")
PICTURES = ["errors.png", "confusion_matrix.png", "training_curves.png"]
EXPLANATIONS = ["explain.png", "filters.png", "embedding.png"]


@pytest.fixture(scope="module")
def net() -> Net:
    """An untrained network in eval mode whose batch normalisation does something."""
    torch.manual_seed(0)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.02, 0.1)
    return model


@pytest.fixture(autouse=True)
def style():
    with matplotlib.style.context(["default", viz.STYLE]):
        yield
    viz.plt.close("all")


def make_reading(mistakes: int, n: int = 200) -> viz.Reading:
    """`n` random images, the first `mistakes` of which are misread."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 10
    predicted = torch.where(torch.arange(n) < mistakes, (labels + 1) % 10, labels)
    return viz.Reading(Split(images, labels), predicted, torch.rand(n, generator=generator))


def panels(figure: Figure) -> list:
    """The axes that show an image."""
    return [axis for axis in figure.axes if axis.images]


def assert_pictures(out: Path, names: list[str]) -> None:
    """Exactly `names` are in `out`: PNG files of a sensible size at 150 dpi that are not blank."""
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        with Image.open(out / name) as image:
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert 1000 <= image.width <= 2000 and 200 <= image.height <= 1500, (name, image.size)
            assert np.asarray(image.convert("L")).std() > 5


def assert_legible(figure: Figure) -> None:
    """No text overlaps another or leaves the figure."""
    texts = []
    with mock.patch.object(Text, "draw", lambda text, _: texts.append(text)):
        figure.draw_without_rendering()
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 1 or not panels(figure)
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert inside, f"{text!r} leaves the figure"
    for (a, first), (b, second) in combinations(boxes, 2):
        assert not first.padded(-0.5).overlaps(second.padded(-0.5)), f"{a!r} overlaps {b!r}"


def test_default_pictures(run: Callable, trained: Path, tmp_path: Path) -> None:
    done = run("visualize_errors.py", "--checkpoint", trained / "model.pt", "--out", tmp_path / "new" / "plots")
    assert_pictures(tmp_path / "new" / "plots", PICTURES)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / "new" / "plots" / name) for name in PICTURES]
    assert len({re.match(r"\S+ +", line).end() for line in lines}) == 1  # the descriptions line up

    last = json.loads((trained / "history.json").read_text())[-1]
    assert re.search(r"\d+ of 500 test digits misread|None of 500", lines[0])
    assert f"Validation accuracy {last['val_accuracy']:.2f}% and loss {last['val_loss']:.4f} after 3 epochs" in lines[2]


def test_no_history(run: Callable, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "model.pt", tmp_path / "alone.pt")
    out = tmp_path / "plots"
    done = run("visualize_errors.py", "--checkpoint", tmp_path / "alone.pt", "--out", out)
    assert_pictures(out, PICTURES[:2])
    assert f"skipped: there is no {tmp_path / 'history.json'}" in done.stdout


def test_the_history_of_another_training_is_not_drawn(run: Callable, trained: Path, tmp_path: Path) -> None:
    """A second training into the same folder, stopped early, leaves the first one's model.pt."""
    shutil.copy(trained / "model.pt", tmp_path)
    history = json.loads((trained / "history.json").read_text())
    (tmp_path / "history.json").write_text(json.dumps(history[:1]))
    done = run("visualize_errors.py", "--checkpoint", tmp_path / "model.pt", "--out", tmp_path / "plots")
    assert_pictures(tmp_path / "plots", PICTURES[:2])
    assert "history.json belongs to another training than model.pt" in done.stdout


@pytest.mark.parametrize("wrong", [0, 1])
def test_hardly_any_mistakes(run: Callable, trained: Path, data_dir: Path, tmp_path: Path, wrong: int) -> None:
    """A test set relabelled with what the network reads, but for `wrong` of its labels."""
    data, out = shutil.copytree(data_dir, tmp_path / "data"), tmp_path / "plots"
    model, _ = utils.load_model(trained / "model.pt", CPU)
    labels = utils.predict(model, utils.load_mnist(data_dir, train=False, device=CPU)).argmax(1).numpy()
    labels[:wrong] = (labels[:wrong] + 1) % 10
    write_idx(data / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", labels)
    done = run(
        "visualize_errors.py", "--checkpoint", trained / "model.pt", "--data-dir", data, "--out", out, "--explain",
        "--show", env={"MPLBACKEND": "agg"},
    )  # fmt: skip
    assert_pictures(out, PICTURES + EXPLANATIONS)
    assert done.stdout.count(f"{wrong or 'None'} of 500 test digits misread") == (2 if wrong else 3)
    assert "no window can be opened" in done.stderr


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "{}", "3", '"epoch"', "[1]", '[{"epoch": 1}]', "\xff\xfe", "[" * 100_000,
     '[{"epoch": 1, "learning_rate": 0.1, "train_loss": NaN, "train_accuracy": 9.0}]',
     '[{"epoch": 1, "learning_rate": 0.1, "train_loss": "low", "train_accuracy": 9.0}]'],
)  # fmt: skip
def test_broken_history_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "history.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"history\.json is damaged or not a history"):
        viz.read_history(tmp_path / "history.json")


def test_bad_input_is_one_line(run: Callable, trained: Path, tmp_path: Path) -> None:
    def refuse(*args: object) -> str:
        (line,) = run("visualize_errors.py", *args, status=2).stderr.strip().splitlines()
        return line

    missing = refuse("--checkpoint", tmp_path / "none.pt", "--out", tmp_path / "plots")
    assert "`python train.py`" in missing and "`--checkpoint assets/mnist_cnn.pt`" in missing
    shutil.copy(trained / "model.pt", tmp_path)
    (tmp_path / "history.json").write_text("[")
    assert "history.json" in refuse("--checkpoint", tmp_path / "model.pt", "--out", tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("flags", [["--max", "0"], ["--max", "401"], ["--images", "a.png", "--explain"], ["--images"]])
def test_flags_are_refused_by_argparse(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        viz.parse_args(flags)
    assert "usage:" in capsys.readouterr().err


def test_own_images(run: Callable, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    paper = np.full((90, 60, 3), 230, np.uint8)
    paper[20:70, 28:33] = 20  # a one
    for name in ("a.png", "b_$x$_and_a_very_long_name_that_goes_on_and_on.png", "c.png"):
        Image.fromarray(paper).save(folder / name)
    (folder / "broken.png").write_bytes(b"not an image")
    arguments = ["--checkpoint", trained / "model.pt", "--data-dir", tmp_path / "none", "--out", tmp_path / "plots"]

    done = run("visualize_errors.py", *arguments, "--images", folder, status=1)
    assert_pictures(tmp_path / "plots", ["images.png"])
    path, title = done.stdout.split(maxsplit=1)
    assert path == str(tmp_path / "plots" / "images.png") and title == "What the network reads in 3 images\n"
    assert "broken.png" in done.stderr and len(done.stderr.splitlines()) == 1

    done = run("visualize_errors.py", *arguments, "--images", folder / "a.png", folder / "c.png", "--max", 1)
    assert "first 1 of 2 images" in done.stdout and "reads in 1 image\n" in done.stdout


def test_a_failed_write_keeps_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "errors.png"
    path.write_bytes(b"good")

    class FullDisk(Figure):
        def savefig(self, temporary: Path, **_: object) -> None:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        viz.save(FullDisk(), path, keep=False)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mistakes", "shown"), [(0, 0), (1, 1), (7, 7), (13, 13), (73, 50)])
def test_errors_are_sorted_and_counted(mistakes: int, shown: int) -> None:
    reading = make_reading(mistakes)
    figure = viz.plot_errors(reading, limit=50)
    assert_legible(figure)
    assert len(panels(figure)) == shown
    wrong = sorted(range(mistakes), key=lambda i: -reading.confidence[i])[:shown]
    for axis, i in zip(panels(figure), wrong):
        assert axis.get_title("left") == f"{i % 10} → {(i + 1) % 10}"
        assert axis.get_title("right") == f"{reading.confidence[i]:.1%}"
        assert np.array_equal(axis.images[0].get_array(), reading.split.images[i, 0])
    assert figure.get_suptitle().startswith(f"{mistakes or 'None'} of 200 test digits misread")


def test_confusion_matrix_colours_the_mistakes_alone() -> None:
    figure = viz.plot_confusion(make_reading(25))  # 3 each of 0 to 4 read as the next digit, 2 each of 5 to 9
    assert_legible(figure)
    (image,) = figure.axes[0].images
    assert image.get_array().mask.diagonal().all()
    assert image.get_array().filled(0).tolist() == [
        [(3 if true < 5 else 2) * (read == (true + 1) % 10) for read in range(10)] for true in range(10)
    ]
    numbers = [int(text.get_text()) for text in figure.axes[0].texts]
    assert sorted(numbers) == [2] * 5 + [3] * 5 + [17] * 5 + [18] * 5
    assert figure.get_suptitle() == "25 of 200 test digits misread, most often 0 as 1 (3 times)"


@pytest.mark.parametrize("epochs", [1, 2, 20])
@pytest.mark.parametrize("validated", [False, True])
def test_training_curves(epochs: int, validated: bool) -> None:
    history = [
        {"epoch": i, "learning_rate": 0.1 / i, "train_loss": 0.6 / i, "train_accuracy": 100 - 20 / i,
         **({"val_loss": 0.1, "val_accuracy": 100.0} if validated else {})}
        for i in range(1, epochs + 1)
    ]  # fmt: skip
    figure = viz.plot_history(history)
    assert_legible(figure)
    assert [len(axis.lines) for axis in figure.axes] == [1, 1 + validated, 1 + validated]
    assert figure.axes[2].lines[0].get_ydata().tolist() == [entry["train_accuracy"] for entry in history]
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() for axis in figure.axes)
    assert figure.get_suptitle().startswith("Validation" if validated else "Training")


@pytest.mark.parametrize(("mistakes", "shown"), [(0, 0), (1, 1), (3, 3), (12, 8)])
def test_explanations_show_both_digits(net: Net, mistakes: int, shown: int) -> None:
    figure = viz.plot_explanations(net, make_reading(mistakes, n=40), CPU)
    assert_legible(figure)
    assert len(panels(figure)) == 5 * shown
    if shown:
        true, predicted = panels(figure)[0].get_title("left").split(" → ")
        assert [axis.get_title("left") for axis in panels(figure)[1:5]] == [
            f"{method}: {digit}" for method in ("Grad-CAM", "SmoothGrad") for digit in (true, predicted)
        ]


def test_filters_and_maps(net: Net) -> None:
    reading = make_reading(1)
    figure = viz.plot_filters(net, reading, CPU)
    assert_legible(figure)
    shown = [np.asarray(axis.images[0].get_array()) for axis in panels(figure)]
    assert len(shown) == 1 + 12 + 12 + 24 + 24 + 12
    assert np.array_equal(shown[1:13], net.block1.conv.weight[:, 0].detach())
    first = net.block1(utils.normalize(reading.split.images[:1] / 255))[0]
    assert np.allclose(shown[13:25], first.detach(), atol=1e-6)
    wide = viz.plot_filters(Net(width=4).eval(), reading, CPU)
    assert_legible(wide)
    assert len(panels(wide)) == 1 + 5 * viz.MAPS_SHOWN


def test_embedding_uses_the_features_of_the_forward_pass(net: Net) -> None:
    split = make_reading(0).split
    with viz.recording(net.act) as outputs:
        logits = utils.predict(net, split, batch_size=64)
    assert [len(part) for part in outputs[net.act]] == [64, 64, 64, 8]
    torch.testing.assert_close(net.fc2(torch.cat(outputs[net.act])), logits)

    reading = viz.read(net, split)
    figure = viz.plot_embedding(net, reading, split)
    assert_legible(figure)
    everything, mistakes = figure.axes[0].collections
    assert len(everything.get_offsets()) == 200 and len(mistakes.get_offsets()) == len(reading.mistakes())
    assert sorted(text.get_text() for text in figure.axes[0].texts) == list("0123456789")


def test_recording_leaves_no_hooks(net: Net) -> None:
    x, classes = torch.rand(2, 1, 28, 28), torch.tensor([3, 8])
    viz.grad_cam(net, x, classes)
    with pytest.raises(RuntimeError), viz.recording(net.act, net.block1):
        net(torch.rand(1, 2, 28, 28))
    assert not any(module._forward_hooks or module._backward_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_grad_cam_by_hand(net: Net) -> None:
    """Selvaraju et al. (2017), equations 1 and 2, on the activated maps of the third block, written out."""
    x, classes = torch.randn(5, 1, 28, 28), torch.tensor([4, 9, 0, 1, 2])
    for i, digit in enumerate(classes.tolist()):
        block = net.block3
        maps = block.act(block.norm(block.conv(net.block2(net.block1(x[i : i + 1]))))).detach().requires_grad_()
        logits = net.fc2(net.act(net.fc1(net.pool(net.block4(maps)).flatten(1))))
        logits[0, digit].backward()
        total = np.zeros((7, 7))
        for k in range(24):
            total += maps.grad[0, k].numpy().sum() / 49 * maps[0, k].detach().numpy()
        coarse = torch.from_numpy(np.maximum(total, 0)).float()[None, None]
        expected = F.interpolate(coarse, (28, 28), mode="bilinear")[0, 0]
        torch.testing.assert_close(viz.grad_cam(net, x, classes)[i], expected, rtol=1e-4, atol=1e-6)
    assert (viz.grad_cam(net, x, classes).amax((1, 2)) > 0).sum() >= 2  # rectified, but hardly ever to nothing


def test_smooth_grad_of_a_linear_and_of_a_quadratic_model() -> None:
    x, classes = torch.rand(4, 1, 28, 28), torch.tensor([0, 3, 3, 9])
    linear = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    expected = linear[1].weight[classes].abs().view(4, 28, 28)  # the same whatever the noise
    torch.testing.assert_close(viz.smooth_grad(linear, x, classes), expected.detach(), rtol=1e-4, atol=1e-6)

    class Quadratic(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x**2).flatten(1).sum(1, keepdim=True).expand(-1, 10)

    # The gradient is 2x, so the result is 2 |x + mean noise|: the noise's size and number can be read off it.
    noise = viz.smooth_grad(Quadratic(), x + 10, classes, samples=25, noise=0.5) / 2 - (x[:, 0] + 10)
    contrast = float((x.amax((1, 2, 3)) - x.amin((1, 2, 3))).mean())
    assert noise.std().item() == pytest.approx(0.5 * contrast / 5, rel=0.05)


def test_pca() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 5.0, 0.1, 3.0])
    features = torch.randn(2000, 4, generator=generator) * scales + 7
    points, shares = viz.pca(features, components=4)
    covariance = np.cov(features.double().numpy().T)
    assert torch.allclose(points.mean(0), torch.zeros(4, dtype=torch.double), atol=1e-6)
    expected = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    np.testing.assert_allclose(np.cov(points.numpy().T), np.diag(expected), atol=1e-6)  # orthogonal, in order
    np.testing.assert_allclose(shares, expected / expected.sum(), rtol=1e-6)
    for component, feature in ((0, 1), (1, 3), (2, 0), (3, 2)):
        assert np.corrcoef(points[:, component], features[:, feature])[0, 1] > 0.99

    order = torch.randperm(2000, generator=generator)
    torch.testing.assert_close(viz.pca(features[order])[0], points[order, :2], rtol=0, atol=1e-4)  # signs included


def test_labels_are_spread() -> None:
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.05, 0.1], [9.0, 9.0]])
    moved = viz.spread(points, gap=1.0)
    assert torch.pdist(moved).min() > 0.99
    assert torch.equal(moved[3], points[3])
