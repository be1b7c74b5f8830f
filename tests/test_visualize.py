"""visualize_errors.py: its pictures as users get them, and what they show."""

from itertools import combinations
from unittest import mock

import matplotlib.style
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.text import Text
from numpy.testing import assert_allclose
from PIL import Image, ImageShow
from torch import nn

import utils
import visualize_errors as viz
from extras import photos

SCRIPT = "visualize_errors.py"
PICTURES = ["errors", "confusion_matrix", "training_curves", "explain", "filters", "doubts"]
PICTURES = [f"{name}.png" for name in PICTURES]
LONG = [f"nkle boot{i}" for i in range(10)]


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


def panels(figure):
    return [axis for axis in figure.axes if axis.images]


def pixels(axis):
    return np.asarray(axis.images[0].get_array())


def assert_pictures(out, names):
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5


def assert_legible(figure):
    """No text overlaps another or a picture, or leaves the figure; returns all texts."""
    texts = []
    with mock.patch.object(Text, "draw", lambda text, _: texts.append(text)):
        figure.draw_without_rendering()
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text, text.get_window_extent().padded(-0.5)) for text in texts]
    for text, box in boxes:
        assert box.min.min() >= 0 and (box.max <= figure.bbox.max).all()
        others = [axis for axis in panels(figure) if axis is not text.axes]
        assert not any(axis.bbox.overlaps(box) for axis in others)
    for (_, box), (_, its_box) in combinations(boxes, 2):
        assert not box.overlaps(its_box)
    return "\n".join(text.get_text() for text in texts)


def test_as_a_user_types_it(run, trained, tmp_path):
    """Without windows and a folder for matplotlib's cache."""
    out = tmp_path / "new" / "plots"
    env = {"MPLBACKEND": "nonsense", "MPLCONFIGDIR": __file__}
    done = run(SCRIPT, "--checkpoint", trained, "--out", out, **env)
    assert_pictures(out, PICTURES)
    assert not done.stderr
    paths, titles = zip(*(line.split(": ", 1) for line in done.stdout.splitlines()))
    assert list(paths) == [str(out / name) for name in PICTURES]
    accuracy = utils.load_checkpoint(trained / "model.pt")["metrics"]["test_accuracy"]
    wrong = round(1000 - 1000 * accuracy)
    assert titles[0] == f"{wrong} of 1,000 test images misread"
    assert f"Test accuracy {accuracy:.2%} and loss " in titles[2]
    assert f"8 of {wrong} mistakes" in titles[3]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_own_images(call, refuse, net, trained, reading, tmp_path):
    """A number whose name neither fits nor can be written, and no image."""
    number = tmp_path / f"{'and_on' * 20}_$x$_数字.png"
    ink = np.hstack(reading.images[2:4, 0])
    Image.fromarray(255 - ink).resize((560, 280)).save(number)
    out = tmp_path / "plots"
    flags = ("--checkpoint", trained, "--out", out, "--images", number, __file__)
    _, stderr = call(SCRIPT, *flags, status=1)
    assert __file__ in stderr and stderr.count("\n") == 1  # none of missing letters
    assert_pictures(out, ["images.png"])
    assert "first 1 of 2 images" in call(SCRIPT, *flags, "--max", 1)[0]
    with mock.patch.object(photos, "read_files", return_value=[]) as read:
        call(SCRIPT, *flags, "--raw", status=1)
    assert read.call_args.args[2]
    refuse(SCRIPT, "--raw", words=["--raw goes with --images"])

    found = list(photos.read_files(net, [number] * 2))
    figure = viz.plot_images(found)
    assert "and_on_$x$_数字.png\n" in assert_legible(figure)
    _, seen, report = found[0]
    _, read, chart, *_ = figure.axes
    assert read.get_title("left") == f"reads {report['number']}"
    assert np.array_equal(pixels(read), np.hstack([*seen]))
    confidence, i = min((digit["confidence"], i) for i, digit in enumerate(report["digits"]))
    assert chart.get_title("right") == f"{i + 1} of 2:  {viz.percent(confidence)}"
    heights = [bar.get_height() for bar in chart.patches]
    assert heights == report["digits"][i]["probabilities"]


@pytest.mark.parametrize("names", [viz.NAMES, LONG])
def test_pictures_are_legible(names, net, reading, monkeypatch):
    """Also those of a network that errs nowhere."""
    monkeypatch.setattr(viz, "NAMES", names)
    monkeypatch.setattr(viz, "NAMES_ARE_LONG", names is LONG)
    least = {"probabilities": [0.1] * 10, "confidence": 0.5}
    report = {"path": "a", "number": names[9], "second_guess": names[2], "digits": [least]}
    found = [(Image.new("L", (28, 28)), reading.images[0], report)] * 3
    perfect = reading._replace(probabilities=torch.eye(10)[reading.labels])
    for figure in (
        viz.plot_errors(reading, 20), viz.plot_explanations(net, reading), viz.plot_images(found),
        viz.plot_confusion(reading), viz.plot_filters(net, reading), viz.plot_doubts(reading),
        viz.plot_errors(perfect, 20), viz.plot_explanations(net, perfect),
        viz.plot_doubts(perfect), viz.plot_confusion(perfect),
    ):
        words = assert_legible(figure)
        assert "digit" not in words
        assert any(name in words for name in names) or not panels(figure)
    assert "0 of 1,000 test images misread" in words and "most often" not in words


def test_many_classes_and_mistakes(monkeypatch):
    """All of 1,000 images are misread, each as the next class."""
    names = list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")  # of EMNIST
    monkeypatch.setattr(viz, "NAMES", names)
    monkeypatch.setattr(utils, "CLASS_NAMES", names)
    labels = torch.arange(1000) % 47
    emnist = viz.Reading(labels, labels, torch.eye(47)[(labels + 1) % 47], "test")
    words = assert_legible(viz.plot_confusion(emnist)).splitlines()
    assert {*names, "most often 0 as 1, 1 as 2, 2 as 3, … (22)"} <= {*words}
    figure = viz.plot_doubts(emnist)
    assert_legible(figure)
    _, mistakes = figure.axes[0].collections
    assert mistakes.get_linewidths()[0] < 0.3 and mistakes.get_sizes()[0] < 10


def test_errors_are_sorted_and_counted(reading):
    assert viz.percent(torch.tensor(0.9992)) == "> 99.9%"
    confidence, predicted = reading.probabilities.max(1)
    wrong = (predicted != reading.labels).nonzero()[:, 0].tolist()
    wrong.sort(key=lambda i: -confidence[i])
    shown = panels(viz.plot_errors(reading, 12))
    assert len(shown) == 12 < len(wrong)
    for axis, i in zip(shown, wrong):
        label = reading.labels[i]
        assert axis.get_title("left") == f"{label} → {predicted[i]}"
        assert axis.get_title("right") == viz.percent(confidence[i])
        below = [text.get_text() for text in axis.texts]
        assert below == [f"#{i}", f"{label}: {reading.probabilities[i, label]:.1%}"]
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


def test_training_curves():
    """Rate and training loss have two values in each epoch."""
    e = np.arange(1, 21)
    history = [
        {"epoch": i, "learning_rate": i - 1, "learning_rates": [i - 0.5, i], "train_loss": 1.5 / i,
         "train_losses": [2 / i, 1 / i], "train_accuracy": 1 - 0.2 / i}
        for i in e.tolist()
    ]
    words = assert_legible(viz.plot_history(history[:1], {}))
    assert "Training accuracy 80.00% and loss 1.5000 after 1 epoch" in words
    assert "validation" not in words
    history = [{**entry, "val_loss": 0.1, "val_accuracy": 0.96} for entry in history]
    figure = viz.plot_history(history, {"test_loss": 0.02, "test_accuracy": 0.995})
    words = assert_legible(figure)
    assert "Test accuracy 99.50% and loss 0.0200 after 20 epochs" in words
    assert "validation" in words
    rates, losses, errors = ([line.get_xydata().T for line in axis.lines] for axis in figure.axes)
    x = np.arange(0, 20.1, 0.5)
    assert_allclose(rates[0], [x, x])
    assert_allclose(losses[0], [x[1:], np.stack([2 / e, 1 / e], 1).ravel()])
    assert_allclose(errors[0], [e, 20 / e])
    assert_allclose([losses[1], errors[1]], [[e, [0.1] * 20], [e, [4] * 20]])
    assert_allclose([losses[2], errors[2]], [[[20], [0.02]], [[20], [0.5]]])


def grad_cam(net, x, target):
    """Equations 1 and 2 of its paper, on the activated maps of the last 3x3 block."""
    maps = net.blocks[:3](x).detach().requires_grad_()
    logits = net.fc2(net.act(net.fc1(net.pool(net.blocks[3:](maps)).flatten(1))))
    (gradients,) = torch.autograd.grad(logits[0, target], maps)
    total = (gradients.sum((2, 3), keepdim=True) / 49 * maps.detach()).sum(1, keepdim=True)
    return F.interpolate(total.clamp(min=0), (28, 28), mode="bilinear")[0, 0]


@pytest.mark.original
def test_explanations_show_both_classes(net, reading):
    shown = panels(viz.plot_explanations(net, reading))
    i = reading.mistakes()[1]
    assert np.array_equal(pixels(shown[5]), reading.images[i, 0])
    heats = [
        (f"{name}: {c}", method(net, reading.images[i, None] / 255, c))
        for name, method in (("Grad-CAM", grad_cam), ("SmoothGrad", viz.smooth_grad))
        for c in (reading.labels[i], reading.predicted[i])
    ]
    for axis, (title, heat) in zip(shown[6:], heats):
        assert axis.get_title("left") == title
        assert_allclose(pixels(axis), heat, 1e-4, 1e-6)


@pytest.mark.original
def test_filters_and_maps(net, reading):
    shown = [pixels(axis) for axis in panels(viz.plot_filters(net, reading))]
    assert len(shown) == 1 + 12 + 12 + 24 + 24 + 12
    assert np.array_equal(shown[0], reading.images[0, 0])
    assert np.array_equal(shown[1:13], net.blocks[0].conv.weight[:, 0].detach())
    assert_allclose(shown[-12:], net.blocks(reading.images[:1] / 255)[0].detach(), atol=1e-5)


def test_doubts_lie_between_the_answers(reading):
    """A point is the mean of places on a circle, by the fourth roots of the probabilities."""
    (axis,) = viz.plot_doubts(reading).axes
    everything, mistakes = (np.asarray(dots.get_offsets()) for dots in axis.collections)
    assert "".join(text.get_text() for text in axis.texts) == "0123456789"
    corners = np.array([text.get_position() for text in axis.texts]) / 1.08
    assert abs(corners[0] - corners[6]).sum() < 1 < abs(corners[0] - corners[1]).sum()
    weights = reading.probabilities.numpy() ** (1 / 4)
    means = weights / weights.sum(1, keepdims=True) @ corners
    assert_allclose(everything, means, atol=1e-4)
    assert np.array_equal(everything[reading.mistakes()], mistakes)


def test_pictures_that_do_not_apply(call, trained, tmp_path, monkeypatch, capsys):
    """No old picture stays; the new ones are opened."""
    missing = ["explain.png", "filters.png"]
    for name in missing:
        (tmp_path / name).write_bytes(b"of another network")
    linear = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    checkpoint = utils.load_checkpoint(trained / "model.pt")
    monkeypatch.setattr(utils, "load_model", lambda *_: (linear, checkpoint))
    show = mock.Mock(return_value=True)
    monkeypatch.setattr(ImageShow, "show", show)
    stdout, stderr = call(SCRIPT, "--split", "val", "--out", tmp_path, "--max", 1, "--show")
    assert "of 400 validation images misread" in stdout and not stderr
    assert "explain.png: not drawn, no block has a convolution wider than 1x1\n" in stdout
    assert "filters.png: not drawn, the network has no convolution\n" in stdout
    names = [name for name in PICTURES if name not in missing]
    assert_pictures(tmp_path, names)
    assert [shown.args[1] for shown in show.call_args_list] == names
    show.return_value = False
    viz.show([tmp_path / names[0]] * 2)
    stderr = capsys.readouterr().err
    assert "warning: --show found no viewer" in stderr and stderr.count("\n") == 1
