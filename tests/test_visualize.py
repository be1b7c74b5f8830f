"""visualize_errors.py: its pictures as users get them, what they show, its mathematics by hand."""

import re
from itertools import combinations
from pathlib import Path
from unittest import mock

import matplotlib.style
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageShow

import utils
import visualize_errors as viz
from extras import photos
from visualize_errors import Reading

PICTURES = ["errors", "confusion_matrix", "training_curves", "explain", "filters", "doubts"]
PICTURES = [f"{name}.png" for name in PICTURES]
LONG = [f"Ankle boot{i}"[-10:] for i in range(10)]


@pytest.fixture(autouse=True)
def style():
    with matplotlib.style.context(["default", viz.STYLE]):
        yield


@pytest.fixture(scope="module")
def net(trained):
    return utils.load_model(trained, "cpu")[0]


@pytest.fixture(scope="module")
def reading(net, test_split):
    return viz.read_split(net, test_split, "test")


def panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.images]


def pixels(axis: Axes) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


def assert_pictures(out: Path, names: list[str]) -> None:
    """Exactly `names` are in `out`: PNG files of a sensible size that are not blank."""
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        with Image.open(out / name, formats=["PNG"]) as image:
            assert 1000 <= image.width <= 2000 and 150 <= image.height <= 1500, image.size
            assert np.asarray(image.convert("L")).std() > 5


def assert_legible(figure: Figure) -> str:
    """No text overlaps another or a picture, or leaves the figure; returns all texts."""
    texts = []
    with mock.patch.object(Text, "draw", lambda text, _: texts.append(text)):
        figure.draw_without_rendering()
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text, text.get_window_extent().padded(-0.5)) for text in texts]
    for text, box in boxes:
        assert box.min.min() >= 0 and (box.max <= figure.bbox.max).all(), f"{text} leaves it"
        others = [axis for axis in panels(figure) if axis is not text.axes]
        assert not any(axis.bbox.overlaps(box) for axis in others), f"{text} lies on a picture"
    for (text, box), (other, its_box) in combinations(boxes, 2):
        assert not box.overlaps(its_box), f"{text} overlaps {other}"
    return "\n".join(text.get_text() for text in texts)


def test_as_a_user_types_it(run, trained, reading, tmp_path):
    """Whatever windows are set up, without extras/, and where matplotlib can keep no cache."""
    out = tmp_path / "new" / "plots"
    startup = tmp_path / "sitecustomize.py"
    startup.write_text("import sys; sys.modules['extras'] = None")
    env = {"MPLBACKEND": "nonsense", "MPLCONFIGDIR": str(startup), "PYTHONPATH": str(tmp_path)}
    done = run("visualize_errors.py", "--checkpoint", trained, "--out", out, **env)
    assert_pictures(out, PICTURES)
    assert not done.stderr
    paths, titles = zip(*(line.split(": ", 1) for line in done.stdout.splitlines()))
    assert list(paths) == [str(out / name) for name in PICTURES]
    wrong = int((reading.predicted != reading.labels).sum())
    accuracy = utils.load_checkpoint(trained / "model.pt")["metrics"]["test_accuracy"]
    assert titles[0] == f"{wrong} of 1,000 test images misread"
    assert re.fullmatch(titles[0] + r", most often \d as \d.* \(\d+\)", titles[1])
    assert re.fullmatch(f"Test accuracy {accuracy:.2%} and loss .* after 3 epochs", titles[2])
    assert f"8 of {wrong} mistakes" in titles[3] and titles[5].endswith(titles[0])


def test_no_folder_can_be_written(run, tmp_path):
    """Not even a temporary one, which matplotlib needs."""
    (tmp_path / "tempfile.py").write_text("def mkdtemp(**_):\n    raise OSError")
    env = {"PYTHONPATH": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "tempfile.py")}
    done = run("visualize_errors.py", status=2, **env)
    assert "set the MPLCONFIGDIR" in done.stderr and len(done.stderr.splitlines()) == 1


def test_show_opens_what_was_drawn(call, trained, tmp_path, monkeypatch, capsys):
    """And nothing else in the folder; one warning without a viewer."""
    show = mock.Mock(return_value=True)
    monkeypatch.setattr(ImageShow, "show", show)
    monkeypatch.setattr(viz, "EXPLAINED", 1)
    Image.new("L", (9, 9)).save(tmp_path / "holiday.png")
    flags = ("--checkpoint", trained, "--split", "val", "--out", tmp_path, "--max", 10, "--show")
    stdout, stderr = call("visualize_errors.py", *flags)
    assert "of 400 validation images misread" in stdout
    assert [shown.args[1] for shown in show.call_args_list] == PICTURES and not stderr
    show.return_value = False
    viz.show([tmp_path / "errors.png", tmp_path / "filters.png"])
    assert re.fullmatch(".*warning: --show found no viewer.*\n", capsys.readouterr().err)


def test_own_images(call, trained, reading, tmp_path):
    """Test digits as scans, one with a name that does not fit, one a number; and no image."""
    digits = reading.images[:, 0].numpy()
    name = f"a_$x$_{'and_on' * 20}.png"
    scans = {name: digits[1], "b.png": np.hstack([digits[0], digits[17]]), "数字.png": digits[2]}
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, ink in scans.items():
        Image.fromarray(255 - ink).resize((10 * ink.shape[1], 280)).save(folder / name)
    (folder / "broken.png").write_bytes(b"not an image")
    flags = ["--checkpoint", trained, "--out", tmp_path / "plots", "--images", folder]
    with mock.patch.object(viz, "plot_images", wraps=viz.plot_images) as plot:
        _, stderr = call("visualize_errors.py", *flags, status=1)
    assert_pictures(tmp_path / "plots", ["images.png"])
    assert "broken.png" in stderr and len(stderr.splitlines()) == 1  # none of missing letters
    assert "first 1 of 4 images" in call("visualize_errors.py", *flags, "--max", 1)[0]

    found = plot.call_args.args[0][:2]
    figure = viz.plot_images(found)
    assert "and_on.png\n" in assert_legible(figure)
    for (_, seen, report), (_, read, chart) in zip(found, np.reshape(figure.axes, (-1, 3))):
        assert read.get_title("left") == f"reads {report['number']}"
        assert np.array_equal(pixels(read), np.hstack([*seen]))
        heights = [bar.get_height() for bar in chart.patches]
        assert heights in [digit["probabilities"] for digit in report["digits"]]
    assert re.match("[12] of 2: ", chart.get_title("right"))


def test_raw_images(call, refuse, trained, monkeypatch):
    refuse("visualize_errors.py", "--raw", words=["--raw goes with --images"])
    read = mock.Mock(return_value=[])
    monkeypatch.setattr(photos, "read_files", read)
    for flags in ([], ["--raw"]):
        call("visualize_errors.py", "--checkpoint", trained, "--images", "a", *flags, status=1)
        assert read.call_args.args[1:] == ([Path("a")], bool(flags))


@pytest.mark.parametrize("names", [viz.NAMES, LONG])
def test_names_of_classes_are_legible(names, net, reading, monkeypatch):
    monkeypatch.setattr(viz, "NAMES", names)
    monkeypatch.setattr(viz, "NAMES_ARE_LONG", names is LONG)
    monkeypatch.setattr(viz, "EXPLAINED", 3)
    least = {"probabilities": reading.probabilities[0].tolist(), "confidence": 0.5}
    report = {"path": "a", "number": names[9], "second_guess": names[2], "digits": [least]}
    found = [(Image.new("L", (28, 28)), reading.images[0], report)] * 3
    for figure in (
        viz.plot_errors(reading, 20), viz.plot_explanations(net, reading), viz.plot_images(found),
        viz.plot_confusion(reading), viz.plot_filters(net, reading), viz.plot_doubts(reading),
    ):
        words = assert_legible(figure)
        assert any(name in words for name in names) and "digit" not in words


def test_many_classes_and_mistakes(monkeypatch):
    """All of 1,000 images are misread, each as the next class."""
    names = list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")  # of EMNIST
    monkeypatch.setattr(viz, "NAMES", names)
    monkeypatch.setattr(utils, "CLASS_NAMES", names)
    labels = torch.arange(1000) % 47
    shares = F.one_hot((labels + 1) % 47, 47).float()
    emnist = Reading(labels, labels, shares, "test")
    words = assert_legible(viz.plot_confusion(emnist)).splitlines()
    assert set(words) >= {*names, "most often 0 as 1, 1 as 2, 2 as 3, … (22)"}
    figure = viz.plot_doubts(emnist)
    assert set(assert_legible(figure).splitlines()) >= set(names)
    everything, mistakes = figure.axes[0].collections
    assert len(np.unique(everything.get_facecolors(), axis=0)) >= 46
    assert mistakes.get_linewidths()[0] < 0.3 and mistakes.get_sizes()[0] < 10  # no black blob


def test_errors_are_sorted_and_counted(reading):
    assert viz.percent(torch.tensor(0.9992)) == "> 99.9%"  # and never 100
    wrong = [i for i in range(1000) if reading.predicted[i] != reading.labels[i]]
    wrong = sorted(wrong, key=lambda i: -reading.probabilities[i].max())
    shown = panels(viz.plot_errors(reading, 12))
    assert len(shown) == 12 < len(wrong)
    for axis, i in zip(shown, wrong):
        label = reading.labels[i]
        shares = reading.probabilities[i]
        assert axis.get_title("left") == f"{label} → {shares.argmax()}"
        assert axis.get_title("right") == viz.percent(shares.max())
        below = [text.get_text() for text in axis.texts]
        assert below == [f"#{i}", f"{label}: {shares[label]:.1%}"]
        assert np.array_equal(pixels(axis), reading.images[i, 0])


def test_confusion_matrix(reading):
    (axis,) = viz.plot_confusion(reading).axes
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (reading.labels, reading.predicted), 1)
    places = {text.get_position(): text.get_text() for text in axis.texts}
    assert places == {(x + 0.5, y + 0.5): str(counts[y, x]) for y, x in np.argwhere(counts)}
    coloured = axis.collections[0].get_array().filled(0)
    assert np.array_equal(coloured, counts - np.diag(counts.diagonal()))
    assert axis.get_ylim() == (10, 0)  # the first class is at the top


def test_a_network_that_errs_nowhere(net, reading):
    perfect = reading._replace(probabilities=F.one_hot(reading.labels, 10).float())
    assert viz.plot_confusion(perfect).get_suptitle() == "0 of 1,000 test images misread"
    for figure in (viz.plot_errors(perfect, 50), viz.plot_explanations(net, perfect)):
        assert_legible(figure)
        assert not panels(figure)
    assert_legible(viz.plot_doubts(perfect))


@pytest.mark.parametrize("epochs, measured", [(1, False), (20, True)])
def test_training_curves(epochs, measured):
    """Rate and training loss are curves within each epoch, here of two checks."""
    e = np.arange(1, epochs + 1)
    val = {"val_loss": 0.1, "val_accuracy": 0.96} if measured else {}
    history = [
        {"epoch": i, "learning_rate": i - 1, "learning_rates": [i - 0.5, i], "train_loss": 1.5 / i,
         "train_losses": [2 / i, 1 / i], "train_accuracy": 1 - 0.2 / i, **val}
        for i in e.tolist()
    ]
    metrics = {"test_loss": 0.02, "test_accuracy": 0.995} if measured else {}
    figure = viz.plot_history(history, metrics)
    words = assert_legible(figure)
    rates, losses, errors = ([line.get_xydata().T for line in axis.lines] for axis in figure.axes)
    x = np.arange(0, epochs + 0.1, 0.5)
    np.testing.assert_allclose(rates[0], [x, x])
    np.testing.assert_allclose(losses[0], [x[1:], np.stack([2 / e, 1 / e], 1).ravel()])
    np.testing.assert_allclose(errors[0], [e, 20 / e])
    if measured:
        np.testing.assert_allclose([losses[1][1], errors[1][1]], [[0.1] * 20, [4] * 20])
        np.testing.assert_allclose([losses[2], errors[2]], [[[20], [0.02]], [[20], [0.5]]])
        assert "Test accuracy 99.50% and loss 0.0200 after 20 epochs" in words
    else:
        assert "Training accuracy 80.00% and loss 1.5000 after 1 epoch" in words
    assert all((name in words) == measured for name in ("validation", "test, after"))


def test_explanations_show_both_classes(net, reading, monkeypatch):
    monkeypatch.setattr(viz, "EXPLAINED", 2)
    shown = panels(viz.plot_explanations(net, reading))
    i = reading.mistakes()[1]
    assert np.array_equal(pixels(shown[5]), reading.images[i, 0])
    heats = [
        (f"{name}: {c}", method(net, reading.images[i, None] / 255, c))
        for name, method in (("Grad-CAM", viz.grad_cam), ("SmoothGrad", viz.smooth_grad))
        for c in (reading.labels[i], reading.predicted[i])
    ]
    for axis, (title, heat) in zip(shown[6:], heats):
        assert axis.get_title("left") == title
        np.testing.assert_allclose(pixels(axis), heat, 1e-4, 1e-6)


def test_filters_and_maps(net, reading):
    shown = [pixels(axis) for axis in panels(viz.plot_filters(net, reading))]
    assert len(shown) == 1 + 12 + 12 + 24 + 24 + 12
    assert np.array_equal(shown[0], reading.images[0, 0])
    assert np.array_equal(shown[1:13], net.blocks[0].conv.weight[:, 0].detach())
    maps = net.blocks(reading.images[:1] / 255)[0]
    np.testing.assert_allclose(shown[-12:], maps.detach(), atol=1e-5)


def test_doubts_lie_between_the_answers(reading):
    """A point is the mean of places on a circle, by the fourth roots of the probabilities."""
    figure = viz.plot_doubts(reading)
    (axis,) = figure.axes
    everything, mistakes = (np.asarray(dots.get_offsets()) for dots in axis.collections)
    places = {text.get_text(): np.array(text.get_position()) for text in axis.texts}
    corners = np.array([places[str(digit)] for digit in range(10)]) / 1.08
    assert abs(corners[0] - corners[6]).sum() < 1 < abs(corners[0] - corners[1]).sum()
    weights = reading.probabilities.numpy() ** (1 / 4)
    means = weights / weights.sum(1, keepdims=True) @ corners
    np.testing.assert_allclose(everything, means, atol=1e-4)
    assert np.array_equal(everything[reading.mistakes()], mistakes)
    assert "softened by a temperature of 4" in figure.legends[0].get_title().get_text()


def test_pictures_that_do_not_apply(call, trained, tmp_path, monkeypatch):
    """Here no convolution; then no blocks, whose filters are shown. No old picture stays."""
    explain = {"explain.png": "no block has a convolution wider than 1x1"}
    both = {**explain, "filters.png": "the network has no convolution"}
    linear = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    convolution = nn.Sequential(nn.Conv2d(1, 9, 28), nn.Flatten(), nn.Linear(9, 10))
    checkpoint = utils.load_checkpoint(trained / "model.pt")
    for model, missing in ((linear, both), (convolution, explain)):
        for name in PICTURES:
            (tmp_path / name).write_bytes(b"of another network")
        monkeypatch.setattr(utils, "load_model", lambda *_, model=model: (model, checkpoint))
        lines = call("visualize_errors.py", "--out", tmp_path, "--max", 1)[0].splitlines()
        for name, line in zip(PICTURES, lines):
            assert (f"not drawn, {missing.get(name)}" in line) == (name in missing), line
        assert_pictures(tmp_path, [name for name in PICTURES if name not in missing])


def test_grad_cam_by_hand(net, test_split):
    """Equations 1 and 2 of its paper, on the activated maps of the last 3x3 block."""
    x = test_split.images[:1] / 255
    maps = net.blocks[:3](x).detach().requires_grad_()
    logits = net.fc2(net.act(net.fc1(net.pool(net.blocks[3:](maps)).flatten(1))))
    (gradients,) = torch.autograd.grad(logits[0, 7], maps)
    total = sum(gradients[0, k].sum() / 49 * maps[0, k].detach() for k in range(24))
    expected = F.interpolate(total.clamp(min=0)[None, None], (28, 28), mode="bilinear")[0, 0]
    assert expected.max() > 0
    np.testing.assert_allclose(viz.grad_cam(net, x, 7), expected, 1e-4, 1e-6)
    assert not any(module._forward_hooks for module in net.modules())
