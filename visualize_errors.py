"""Draw what the network misreads, how it learned and why it errs: `python visualize_errors.py`."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook sets a backend that may be missing here
    logging.getLogger("matplotlib").setLevel("ERROR")  # no word on a temporary cache

import matplotlib.style
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
from PIL import Image, ImageShow
from torch import Tensor

import utils
from model import CLASS_NAMES, Net
from utils import SPLITS, Split, UserError

DARK = "0.15"
MUTED = "0.45"
ACCENT = "#d55e00"
BLUE = "#0072b2"
STYLE = {
    "font.size": 9,
    "text.color": DARK,
    "text.parse_math": False,
    "axes.titlesize": 8.5,
    "axes.titlepad": 4,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "xtick.color": "0.4",
    "ytick.color": "0.4",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}
NAMES = [name[:10] for name in CLASS_NAMES]  # at most ten letters
NAMES_ARE_LONG = max(map(len, NAMES)) > 2  # they need more room; digits do not


class Reading(NamedTuple):
    """The images of a split and what the network reads, on the CPU."""

    images: Tensor  # uint8 (N, 1, 28, 28)
    labels: Tensor  # (N,)
    probabilities: Tensor  # (N, 10)
    name: str  # of the split: "test"

    @property
    def predicted(self) -> Tensor:
        """The predicted classes (N,)."""
        return self.probabilities.argmax(1)

    def mistakes(self) -> Tensor:
        """Indices of the misread images, most confident mistake first."""
        wrong = (self.predicted != self.labels).nonzero().squeeze(1)
        confidence = self.probabilities[wrong].amax(1)
        return wrong[confidence.argsort(descending=True, stable=True)]

    def summary(self) -> str:
        """How many images are misread, as text."""
        return f"{len(self.mistakes()):,} of {len(self.labels):,} {self.name} images misread"

    def answer(self, i: int) -> str:
        """The true and the predicted class of image `i`: "4 → 9"."""
        arrow = "\n→ " if NAMES_ARE_LONG else " → "
        return NAMES[self.labels[i]] + arrow + NAMES[self.predicted[i]]


def read_split(model: Net, split: Split, name: str, tta: bool = False) -> Reading:
    """Let `model` read `split`, called `name`; `tta` as in `utils.predict`."""
    probabilities = utils.predict(model, split.images, tta).softmax(1).cpu()
    return Reading(split.images.cpu(), split.labels.cpu(), probabilities, name)


# --- The pictures ---


def plot_errors(reading: Reading, limit: int) -> Figure:
    """At most `limit` misread images, with both classes, probabilities and index."""
    shown = reading.mistakes()[:limit].tolist()
    columns = 8 if NAMES_ARE_LONG else 10
    figure, axes = sheet(
        reading.summary(),
        f"The {len(shown):,} most confident mistakes: true class → prediction and its probability. "
        f"Below: the index in the {reading.name} images, and the probability of the true class",
        rows=math.ceil(len(shown) / columns) or 1,
        columns=columns,
        panel=1.45 if NAMES_ARE_LONG else 0.95,
        gap=(0.14, 0.65 if NAMES_ARE_LONG else 0.5),
    )
    for axis, i in zip(axes.flat, shown):
        label = reading.labels[i]
        probabilities = reading.probabilities[i]
        below = f"{NAMES[label]}: {percent(probabilities[label])}"
        show_image(axis, reading.images[i, 0])
        caption(axis, reading.answer(i), percent(probabilities.max()))
        style = {"va": "top", "transform": axis.transAxes, "color": MUTED, "fontsize": 8}
        axis.text(0, -0.05, f"#{i}", **style)
        axis.text(1, -0.05, below, ha="right", **style)
    return figure


def percent(probability: Tensor | float) -> str:
    """A probability as text: "> 99.9%", never "100.0%"."""
    return "> 99.9%" if probability > 0.999 else f"{probability:.1%}"


def plot_confusion(reading: Reading) -> Figure:
    """The confusion matrix. Only mistakes have colours: with the diagonal all would be pale."""
    counts = utils.confusion_matrix(reading.predicted, reading.labels).numpy()
    classes = len(NAMES)
    wrong = np.ma.masked_array(counts, np.eye(classes))
    most = int(wrong.max())
    title = reading.summary()
    if most:
        worst = np.argwhere(wrong.filled(0) == most)
        pairs = [f"{NAMES[true]} as {NAMES[answer]}" for true, answer in worst[:3]]
        more = ", …" * (len(worst) > 3)
        title += f"\nmost often {', '.join(pairs)}{more} ({most:,})"
    side = max(6.9, 0.4 * classes)
    figure, axis = chart((side, side + 0.4), title)
    axis.set_facecolor("0.9")  # of the diagonal
    colors = {"cmap": "Blues", "vmin": 0, "vmax": max(1.6 * most, 1)}  # black is legible on all
    axis.pcolormesh(wrong, **colors, edgecolors="0.85", linewidth=0.5)
    for row, column in np.argwhere(counts):
        color = MUTED if row == column else DARK
        count = f"{counts[row, column]:,}"
        axis.text(column + 0.5, row + 0.5, count, ha="center", va="center", color=color)
    middles = np.arange(classes) + 0.5
    axis.set_xticks(middles, NAMES, rotation=90 * NAMES_ARE_LONG)
    axis.set_yticks(middles, NAMES)
    axis.set(xlabel="prediction", ylabel="true class", aspect="equal")
    axis.invert_yaxis()
    return figure


def plot_history(history: list[dict[str, Any]], metrics: dict[str, float]) -> Figure:
    """Learning rate, loss and error of each epoch, and those of the test set, if measured."""
    last = {**history[-1], **metrics}
    epochs = len(history)
    part = next(part for part in ("test", "val", "train") if f"{part}_loss" in last)
    figure, (left, middle, right) = chart(
        (10, 3.7),
        f"{SPLITS[part].capitalize()} accuracy {last[f'{part}_accuracy']:.2%} and loss "
        f"{last[f'{part}_loss']:.4f} after {epochs:,} epoch{'s' * (epochs > 1)}",
        columns=3,
    )
    logs = len(history[0]["train_losses"])  # in each epoch
    times = np.arange(epochs * logs + 1) / logs
    later_rates = [rate for entry in history for rate in entry["learning_rates"]]
    left.plot(times, [history[0]["learning_rate"], *later_rates], color=DARK)
    left.set_ylim(bottom=0)
    train_losses = [loss for entry in history for loss in entry["train_losses"]]
    middle.plot(times[1:], train_losses, color=DARK)
    curves = {
        "train": ("o-", DARK, "training: augmented images"),
        "val": ("s--", ACCENT, "validation"),
        "test": ("D", BLUE, "test, after the last epoch"),
    }
    measured = [*history, {"epoch": epochs, **metrics}]
    for name, (style, color, label) in curves.items():
        entries = [entry for entry in measured if f"{name}_loss" in entry]
        if not entries:
            continue
        x = [entry["epoch"] for entry in entries]
        errors = [100 - 100 * entry[f"{name}_accuracy"] for entry in entries]
        right.plot(x, errors, style, color=color, label=label)
        if name != "train":
            middle.plot(x, [entry[f"{name}_loss"] for entry in entries], style, color=color)
    for axis in (middle, right):
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_ylim(low / 2, 2 * high)  # so that two ticks are shown at least
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
    labels = ("learning rate", "cross-entropy loss", "error (%)")
    for axis, label in zip((left, middle, right), labels):
        axis.set(xlabel="epoch", ylabel=label, xlim=(0, 1.04 * epochs))
        axis.locator_params("x", nbins=6, integer=True, min_n_ticks=1)
        axis.grid(axis="y", color="0.92")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


EXPLAINED = 8  # mistakes in explain.png


def plot_explanations(model: Net, reading: Reading) -> Figure:
    """Grad-CAM and SmoothGrad of the surest mistakes, for the true and the predicted class."""
    mistakes = reading.mistakes()
    shown = mistakes[:EXPLAINED].tolist()
    figure, axes = sheet(
        "What matters for the true and the predicted class: "
        f"{len(shown)} of {len(mistakes):,} mistakes, most confident first",
        "Grad-CAM: where the last convolution wider than 1x1 sees the class. SmoothGrad: which "
        "pixels change its score. Bright is strong, on one scale for both classes.\n"
        "Empty corners can be bright: ink that is missing there speaks for a class, too.",
        rows=math.ceil(len(shown) / 2) or 1,
        columns=2 * 5,
        panel=1.05,
        gap=(0.16, 0.55 if NAMES_ARE_LONG else 0.32),
    )
    for panels, i in zip(axes.reshape(-1, 5), shown):
        image = reading.images[i]
        show_image(panels[0], image[0])
        caption(panels[0], reading.answer(i))
        targets = (reading.labels[i], reading.predicted[i])
        for name, method, pair in (
            ("Grad-CAM", grad_cam, panels[1:3]),
            ("SmoothGrad", smooth_grad, panels[3:]),
        ):
            heats = torch.stack([method(model, image.unsqueeze(0) / 255, c) for c in targets])
            top = float(heats.quantile(0.99))  # single pixels are much brighter
            for axis, c, heat in zip(pair, targets, heats):
                show_image(axis, heat, 0, top, "cividis")
                outline = axis.contour(image[0], levels=[100], colors="white", linewidths=0.9)
                outline.set_path_effects([withStroke(linewidth=2, foreground="0.2")])
                space = "\n" if NAMES_ARE_LONG else " "
                axis.set_title(f"{name}:{space}{NAMES[c]}", loc="left", color=MUTED)
    return figure


MAPS_SHOWN = 24  # at most, of each block


def plot_filters(model: Net, reading: Reading) -> Figure:
    """The first layer's filters, the first image's maps; UserError without a convolution."""
    image = reading.images[0]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise UserError("the network has no convolution")
    shown = {"filters": convolutions[0].weight.detach()[:, 0]}
    x = image.unsqueeze(0) / 255
    for i, block in enumerate(getattr(model, "blocks", []), 1):
        x = block(x).detach()
        if x.dim() == 4:
            shown[f"block {i}"] = x[0]
    figure, axes = sheet(
        "The learned filters of the first layer, and what each block makes of one image "
        f"({NAMES[reading.labels[0]]}, read as {NAMES[reading.predicted[0]]})",
        "Filters: grey is 0, white positive, each on its own scale. Maps: bright is strong, on one "
        f"scale for each block; at most {MAPS_SHOWN} are shown",
        rows=len(shown),
        columns=2 + MAPS_SHOWN,
        panel=0.44,
        gap=(0.05, 0.12),
    )
    show_image(axes[0, 0], image[0])
    for row, (name, maps) in zip(axes, shown.items()):
        text = f"{name}\n{maps.shape[1]}x{maps.shape[2]}"
        row[1].text(0.9, 0.5, text, ha="right", va="center")
        for axis, channel in zip(row[2:], maps):
            if name == "filters":
                bound = float(channel.abs().max())
                show_image(axis, channel, -bound, bound, "gray")
            else:
                show_image(axis, channel, float(maps.min()), float(maps.max()), "cividis")
    return figure


TEMPERATURE = 4  # at 1, nearly all points of doubts.png would lie on the names of the classes


def plot_doubts(reading: Reading) -> Figure:
    """The names on a circle, and for each image a point: their mean, weighted by probability."""
    classes = len(NAMES)
    order = list(range(classes))
    if "".join(NAMES) == "0123456789":
        order = [0, 6, 8, 5, 3, 2, 7, 1, 4, 9]  # neighbours are often confused
    angle = torch.empty(classes)
    angle[order] = torch.arange(classes) * 2 * math.pi / classes
    places = torch.stack([angle.sin(), angle.cos()], 1)
    points = (reading.probabilities.log() / TEMPERATURE).softmax(1) @ places
    palette = matplotlib.colormaps["tab10" if classes <= 10 else "hsv"].resampled(classes)
    colors = palette(reading.labels.numpy())
    mistakes = reading.mistakes()
    scale = min(1, 120 / (len(mistakes) or 1))  # many mistakes: small dots, thin rims
    figure, axis = chart((8, 8.4), f"Between the answers: {reading.summary()}")
    axis.scatter(
        *points.t(), s=5, color=colors, linewidths=0, alpha=0.6,
        label="an image, in the colour of its class",
    )
    axis.scatter(
        *points[mistakes].t(), s=4 + 34 * scale, facecolor=colors[mistakes], linewidths=scale,
        edgecolors="black", label="misread, with a rim",
    )
    for i, (x, y) in enumerate(1.08 * places.numpy()):
        box = {"boxstyle": "round", "facecolor": palette(i), "alpha": 0.5, "linewidth": 0}
        axis.text(x, y, NAMES[i], ha="center", va="center", weight="bold", bbox=box)
    axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
    axis.set_axis_off()
    note = (
        "The nearer a name, the surer. Elsewhere: between the names that it wavers between.\n"
        f"The probabilities are softened by a temperature of {TEMPERATURE}, "
        "so even the surest lie far from their name."
    )
    figure.legend(loc="outside lower center", ncols=2, title=note)
    return figure


def plot_images(found: list[tuple[Image.Image, Tensor, dict[str, Any]]]) -> Figure:
    """The triples of `photos.read_files`: image, its digits (N, 28, 28), report."""
    across = min(2, len(found))
    figure, axes = sheet(
        "What the network reads in your images",
        "The image, what the network sees of it,\nand the probabilities where it is least sure",
        rows=math.ceil(len(found) / across),
        columns=3 * across,
        panel=1.3,
        gap=(0.25, 0.95 if NAMES_ARE_LONG else 0.55),
    )
    for panels, (original, seen, report) in zip(axes.reshape(-1, 3), found):
        left, middle, right = panels
        show_image(left, original)
        name = report["path"][-20:].encode("utf-8", "replace").decode()
        left.set_title(name, loc="left", color=MUTED)
        show_image(middle, torch.cat(list(seen), 1))
        caption(middle, textwrap.fill(f"reads {report['number']}", 20))
        guess = report.get("second_guess")
        doubts = [f"or perhaps {guess}" if guess else "", report.get("doubt", "")]
        middle.set_xlabel(textwrap.fill(" ".join(doubts).strip(), 22), color=MUTED)
        least = min(report["digits"], key=lambda digit: digit["confidence"])
        title = percent(least["confidence"])
        if len(seen) > 1:
            title = f"{report['digits'].index(least) + 1} of {len(seen)}:  {title}"
        right.set_axis_on()
        right.set_title(title, loc="right", color=MUTED)
        probabilities = np.array(least["probabilities"])
        shown = np.sort(probabilities.argsort()[-10:])
        names = [NAMES[i] for i in shown]
        bars = right.bar(range(len(shown)), probabilities[shown], color="0.7", tick_label=names)
        bars[probabilities[shown].argmax()].set_color(ACCENT)
        right.set(yticks=[], ylim=(0, 1))
        right.tick_params(length=0, labelsize=8, rotation=90 * NAMES_ARE_LONG)
    return figure


def grad_cam(model: Net, x: Tensor, target: int) -> Tensor:
    """Where the last convolution wider than 1x1 sees class `target` in x (1, 1, 28, 28): (28, 28).

    Grad-CAM (Selvaraju et al., 2017): the maps of its block, after the activation, are weighted by
    the mean gradient of the class's logit over each map. Their sum is rectified and interpolated
    to the input's size. Raises UserError if no block has such a convolution.
    """
    blocks = [
        block
        for block in getattr(model, "blocks", [])
        for module in block.modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    ]
    if not blocks:
        raise UserError("no block has a convolution wider than 1x1")
    outputs = []
    with blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        logits = model(x)
    maps = outputs[-1]
    (gradients,) = torch.autograd.grad(logits[0, target], maps)
    cam = F.relu((gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
    return F.interpolate(cam.detach(), x.shape[2:], mode="bilinear")[0, 0]


def smooth_grad(model: nn.Module, x: Tensor, target: int) -> Tensor:
    """How strongly each pixel of x (1, 1, 28, 28) changes the logit of class `target`: (28, 28).

    SmoothGrad (Smilkov et al., 2017): the absolute value of the mean gradient over 100 copies with
    Gaussian noise, whose standard deviation is a fifth of the image's range.
    """
    normal = torch.randn(100, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    noisy = (x + 0.2 * (x.max() - x.min()) * normal).requires_grad_()
    (gradients,) = torch.autograd.grad(model(noisy)[:, target].sum(), noisy)
    return gradients.mean(0).abs()[0]


# --- Figures and panels ---


def chart(size: tuple[float, float], title: str, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of `size` inches with a title, and its axis, or an array of `columns` axes."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.1 / size[0], ha="left")
    return figure, figure.subplots(1, columns)


def sheet(
    title: str, note: str, rows: int, columns: int, panel: float, gap: tuple[float, float]
) -> tuple[Figure, np.ndarray]:
    """Empty square panels (rows, columns) with a title and a grey note.

    `panel` and `gap` (across, down) are in inches. Laid out by hand: an engine takes minutes.
    """
    header = 0.6 + 0.6 * gap[1] + 0.17 * note.count("\n")
    margin = 0.25
    width = 2 * margin + columns * (panel + gap[0]) - gap[0]
    height = header + rows * (panel + gap[1])
    figure = Figure(figsize=(width, height))
    left = margin / width
    figure.suptitle(title, x=left, y=1 - 0.18 / height, ha="left", va="top")
    figure.text(left, 1 - 0.43 / height, note, va="top", color=MUTED)
    figure.subplots_adjust(
        left=left, right=1 - left, wspace=gap[0] / panel,
        bottom=gap[1] / height, top=1 - header / height, hspace=gap[1] / panel,
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def show_image(
    axis: Axes, image: Any, low: float = 0, high: float = 255, cmap: str = "Greys"
) -> None:
    """Show `image` in a thin frame without ticks; uint8 (28, 28) is dark on white."""
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color="0.8", linewidth=0.6)
    axis.imshow(np.asarray(image), cmap=cmap, vmin=low, vmax=high)


def caption(axis: Axes, left: str, right: str = "") -> None:
    """A line above an image: `left` in bold, `right` in grey."""
    axis.set_title(left, loc="left", fontweight="bold")
    axis.set_title(right, loc="right", color=MUTED)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, and print its path and title."""
    with utils.atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font lacks the letters of some names
        figure.savefig(temporary, format="png")
    print(f"{path}: {figure.get_suptitle()}".replace("\n", ", "))


# --- The command line ---


def draw_split(
    args: argparse.Namespace, model: Net, checkpoint: dict[str, Any], device: torch.device
) -> list[Path]:
    """Draw the pictures; returns their paths. Where one cannot be drawn, its old file goes."""
    split = utils.load_split(args.split, args.data_dir, checkpoint, device)
    reading = read_split(model, split, SPLITS[args.split], args.tta)
    model.cpu()  # where the images are
    pictures = {
        "errors.png": lambda: plot_errors(reading, args.max),
        "confusion_matrix.png": lambda: plot_confusion(reading),
        "training_curves.png": lambda: plot_history(checkpoint["history"], checkpoint["metrics"]),
        "explain.png": lambda: plot_explanations(model, reading),
        "filters.png": lambda: plot_filters(model, reading),
        "doubts.png": lambda: plot_doubts(reading),
    }
    drawn = []
    for name, plot in pictures.items():
        path = args.out / name
        try:
            figure = plot()
        except UserError as error:
            with utils.writing(path):
                path.unlink(missing_ok=True)
            print(f"{path}: not drawn, {error}")
        else:
            save(figure, path)
            drawn.append(path)
    return drawn


def draw_images(args: argparse.Namespace, model: Net) -> tuple[list[Path], int]:
    """Draw the user's own images; returns the picture's path, and how many are unreadable."""
    from extras import photos

    paths = photos.find_images(args.images)
    if len(paths) > args.max:
        print(f"Showing the first {args.max} of {len(paths):,} images; --max N shows more")
        paths = paths[: args.max]
    found = list(photos.read_files(model, paths, args.raw))
    drawn = []
    if found:
        drawn.append(args.out / "images.png")
        save(plot_images(found), drawn[0])
    return drawn, len(paths) - len(found)


def show(paths: list[Path]) -> None:
    """Open pictures in the system's viewer, if it has one."""
    for path in paths:
        with Image.open(path) as image:
            if not ImageShow.show(image, path.name):
                utils.say("warning", "--show found no viewer; the files are written all the same")
                return


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError for flags that do not go together."""
    parser = utils.Parser("Draw what the network misreads, how it learned and why it errs.")
    utils.add_common_flags(parser)
    utils.add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("plots"), metavar="DIR", help="folder of the pictures")
    add("--max", type=utils.number(int, 1, 300), default=50, metavar="N",
        help="mistakes or images to show at most")
    add("--show", action="store_true", help="also open the pictures")
    args = parser.parse_args(argv)
    utils.refuse_unused(parser, args, "images", ["split", "data_dir", "tta"])
    if args.raw and not args.images:
        raise UserError("--raw goes with --images")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    device = utils.choose_device(args.device)
    model, checkpoint = utils.load_model(args.checkpoint, device)
    unread = 0
    with matplotlib.style.context(["default", STYLE]):
        if args.images:
            drawn, unread = draw_images(args, model)
        else:
            drawn = draw_split(args, model, checkpoint, device)
    if args.show:
        show(drawn)
    return int(unread > 0)


if __name__ == "__main__":
    utils.run_script(main)
