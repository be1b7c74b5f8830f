"""Draw what the network misreads, how it learned and why it errs. All flags: `python visualize_errors.py --help`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and "--show" not in sys.argv:
    os.environ["MPLBACKEND"] = "agg"  # a notebook sets a backend that may be missing here

import matplotlib
import matplotlib.style
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor

import utils
from model import CLASS_NAMES, Net
from utils import SPLITS, Split, UserError, number

CLASSES = len(CLASS_NAMES)

EXPLAINED = 8  # mistakes in explain.png
MAPS_SHOWN, MAPS_IN_ROW = 24, 12  # maps of a block in filters.png; wider networks have more
CIRCLE_ORDER = (
    [0, 6, 8, 5, 3, 2, 7, 1, 4, 9] if CLASSES == 10 else [*range(CLASSES)]
)  # digits often confused are neighbours
TEMPERATURE = 4  # of doubts.png: at 1, nearly all digits would lie in the corners
INK, ACCENT, SECOND, MUTED = "0.15", "#d55e00", "#0072b2", "0.45"
STYLE = {
    "font.size": 9, "axes.titlesize": 8.5, "axes.titlepad": 4, "figure.titlesize": 11, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6", "axes.labelcolor": "0.25",
    "xtick.color": "0.4", "ytick.color": "0.4", "legend.frameon": False, "savefig.dpi": 150,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
}  # fmt: skip
COLORS = matplotlib.colormaps["tab10"]  # a colour for each digit


class Predictions(NamedTuple):
    """A split and the network's answers, on the CPU."""

    split: Split
    name: str  # of the split: "test"
    probabilities: Tensor  # (N, 10)

    @property
    def predicted(self) -> Tensor:
        """The predicted digits (N,)."""
        return self.probabilities.argmax(1)

    def mistakes(self) -> Tensor:
        """Indices of the misread digits, most confident mistake first."""
        wrong = (self.predicted != self.split.labels).nonzero().squeeze(1)
        return wrong[self.probabilities[wrong].amax(1).argsort(descending=True, stable=True)]

    def summary(self) -> str:
        """How many digits are misread, as text."""
        return f"{len(self.mistakes()):,} of {len(self.predicted):,} {self.name} digits misread"


def predict_all(model: Net, split: Split, name: str, tta: bool = False) -> Predictions:
    """Let `model` read `split`, called `name`, on the device of both; `tta` as in `utils.predict`."""
    probabilities = utils.predict(model, split.images, tta).softmax(1).cpu()
    return Predictions(Split(split.images.cpu(), split.labels.cpu()), name, probabilities)


# --- The pictures ---


def plot_errors(predictions: Predictions, limit: int) -> Figure:
    """The misread digits, `limit` at most, each with label, prediction, both probabilities and index in the split."""
    shown = predictions.mistakes()[:limit].tolist()
    figure, axes = sheet(
        predictions.summary(),
        f"The {len(shown):,} most confident mistakes: true label → prediction and its probability. Below: the index in "
        f"the {predictions.name} images, and the probability of the true label",
        rows=max(1, math.ceil(len(shown) / 10)), columns=10, panel=0.95, gap=(0.14, 0.5),
    )  # fmt: skip
    for axis, i in zip(axes.flat, shown):
        label, answer = int(predictions.split.labels[i]), int(predictions.predicted[i])
        show_image(axis, predictions.split.images[i, 0])
        caption(axis, f"{label} → {answer}", percent(predictions.probabilities[i, answer]))
        axis.text(0, -0.05, f"#{i}", va="top", transform=axis.transAxes, color=MUTED, fontsize=8)
        true = f"{label}: {percent(predictions.probabilities[i, label])}"
        axis.text(1, -0.05, true, va="top", ha="right", transform=axis.transAxes, color=MUTED, fontsize=8)
    return figure


def percent(probability: Tensor | float) -> str:
    """A probability as text; one below 1 is never "100.0%"."""
    return "> 99.9%" if probability > 0.999 else f"{probability:.1%}"


def plot_confusion(predictions: Predictions) -> Figure:
    """The confusion matrix. Only mistakes are coloured: next to the diagonal they would all be pale."""
    counts = utils.confusion_matrix(predictions.predicted, predictions.split.labels).numpy()
    wrong = np.ma.masked_array(counts, np.eye(CLASSES))
    most = int(wrong.max())
    (first, *ties) = [f"{true} as {answer}" for true, answer in np.argwhere(wrong.filled(0) == most)]
    also = f" and {ties[0]}" if len(ties) == 1 else f" and {len(ties)} other pairs" if ties else ""
    worst = f", most often {first}{also} ({most:,}{' each' if ties else ''})" if most else ""

    figure, axis = chart((6.9, 7.2), predictions.summary() + worst)
    axis.set_facecolor("0.9")  # of the diagonal
    axis.imshow(wrong, cmap="Blues", vmin=0, vmax=max(most, 1))
    for row, column in np.argwhere(counts):
        count = counts[row, column]
        color = MUTED if row == column else "white" if count > 0.6 * most else INK  # seen on dark and light blue
        axis.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    axis.set(xticks=range(CLASSES), yticks=range(CLASSES), xlabel="prediction", ylabel="true digit")
    axis.hlines(np.arange(CLASSES) - 0.5, -0.5, CLASSES - 0.5, color="0.85", linewidth=0.6)
    axis.vlines(np.arange(CLASSES) - 0.5, -0.5, CLASSES - 0.5, color="0.85", linewidth=0.6)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def plot_history(history: list[dict[str, Any]], metrics: dict[str, float]) -> Figure:
    """Learning rate, loss and error; at the last epoch those of the test set, if it was measured."""
    last, count = {**history[-1], **metrics}, len(history)
    part = next(part for part in ("test", "val", "train") if f"{part}_loss" in last)
    figure, axes = chart(
        (10, 3.7),
        f"{SPLITS[part].capitalize()} accuracy {last[f'{part}_accuracy']:.2%} and loss {last[f'{part}_loss']:.4f} "
        f"after {count:,} epoch{'s' * (count > 1)}",
        columns=3,
    )  # fmt: skip
    rates = [entry["learning_rates"] for entry in history]
    steps = [np.linspace(epoch, epoch + 1, len(rates[epoch])) for epoch in range(count)]
    axes[0].plot(np.concatenate(steps), np.concatenate(rates), color=INK, linewidth=1.2)
    axes[0].set_ylim(bottom=0)
    curves = {"training: augmented images": ("train", history, "o-", INK)}
    if "val_loss" in last:
        curves["validation"] = ("val", history, "s--", ACCENT)
    if "test_loss" in metrics:
        curves["test, after the last epoch"] = ("test", [{"epoch": count, **metrics}], "D", SECOND)
    for axis, quantity in zip(axes[1:], ("loss", "accuracy")):
        for label, (part, entries, style, color) in curves.items():
            values = np.array([entry[f"{part}_{quantity}"] for entry in entries])
            values = values if quantity == "loss" else 100 * (1 - values)
            epochs = [entry["epoch"] for entry in entries]
            axis.plot(epochs, values, style, color=color, markersize=4, linewidth=1.2, label=label)
        log_axis(axis, np.concatenate([line.get_ydata() for line in axis.lines]))
    for axis, label in zip(axes, ("learning rate", "cross-entropy loss", "error (%)")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.grid(axis="y", color="0.92")
    hint = None if "val_loss" in last else "for a validation curve: train.py --val-size 5000"
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4, title=hint)
    return figure


def log_axis(axis: Axes, values: np.ndarray) -> None:
    """Make y logarithmic, with room around `values`, a decade at least, and ticks at 1, 2, 5."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    middle = math.sqrt(low * high)
    axis.set_ylim(min(low / 1.3, middle / 3.2), max(high * 1.3, middle * 3.2))
    axis.set_yscale("log")
    axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")


def plot_explanations(model: Net, predictions: Predictions) -> Figure:
    """Grad-CAM and SmoothGrad of the most confident mistakes, for the true and for the predicted digit."""
    mistakes = predictions.mistakes()
    shown = mistakes[:EXPLAINED].tolist()
    figure, axes = sheet(
        f"What matters for the true and for the predicted digit: {len(shown)} of {len(mistakes):,} mistakes, "
        "most confident first",
        "Grad-CAM: where the last convolution wider than 1x1 sees the digit. SmoothGrad: which pixels change its "
        "score. Bright is strong, on one scale for both digits.\nWhite: the digit's outline. Empty corners can be "
        "bright: ink that is missing there speaks for a digit, too.",
        rows=max(1, math.ceil(len(shown) / 2)), columns=10, panel=1.05, gap=(0.16, 0.32),
    )  # fmt: skip
    for panels, i in zip(axes.reshape(-1, 5), shown):
        image = predictions.split.images[i]
        digits = int(predictions.split.labels[i]), int(predictions.predicted[i])
        show_image(panels[0], image[0])
        caption(panels[0], f"{digits[0]} → {digits[1]}", percent(predictions.probabilities[i, digits[1]]))
        for name, method, pair in (("Grad-CAM", grad_cam, panels[1:3]), ("SmoothGrad", smooth_grad, panels[3:5])):
            heats = torch.stack([method(model, image.unsqueeze(0) / 255, digit) for digit in digits])
            top = float(heats.quantile(0.99))  # as in the SmoothGrad paper: single pixels are much brighter
            for axis, digit, heat in zip(pair, digits, heats):
                show_image(axis, heat, 0, top, "cividis")
                contour = axis.contour(image[0].numpy(), levels=[100], colors="white", linewidths=0.9)
                contour.set_path_effects([withStroke(linewidth=2, foreground="0.2")])  # seen on dark and bright ground
                axis.set_title(f"{name}: {digit}", loc="left", color=MUTED)
    return figure


def plot_filters(model: Net, predictions: Predictions) -> Figure:
    """The filters of the first layer, and the maps of each block for the first digit. UserError without convolution."""
    image, label = predictions.split.images[0], predictions.split.labels[0]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise UserError("the network has no convolution")
    groups = {"filters": convolutions[0].weight.detach()[:, 0]}
    x = image.unsqueeze(0) / 255
    for i, block in enumerate(getattr(model, "blocks", []), 1):
        x = block(x).detach()
        if x.dim() == 4:
            groups[f"block {i}"] = x[0]
    rows = [(name, maps[start : start + MAPS_IN_ROW], start) for name, maps in groups.items()
            for start in range(0, min(len(maps), MAPS_SHOWN), MAPS_IN_ROW)]  # fmt: skip
    figure, axes = sheet(
        f"The learned filters of the first layer, and what each block makes of one {label}",
        "Filters: grey is 0, black negative, white positive, each on its own scale. Maps: dark is weak, bright is "
        "strong, on one scale for each block",
        rows=len(rows), columns=2 + MAPS_IN_ROW, panel=0.72, gap=(0.08, 0.12),
    )  # fmt: skip
    show_image(axes[0, 0], image[0])
    axes[0, 0].text(0, -0.1, f"read as {predictions.predicted[0]}", va="top", transform=axes[0, 0].transAxes)
    for row, (name, maps, start) in zip(axes, rows):
        size = f"{maps.shape[1]}x{maps.shape[2]}"
        which = f"{start + 1}–{start + len(maps)} of {len(groups[name])}"
        row[1].text(0, 0.5, f"{name}\n{size}\n{which}", va="center", transform=row[1].transAxes)
        low, high = float(groups[name].min()), float(groups[name].max())
        for axis, channel in zip(row[2:], maps):
            bound = float(channel.abs().max())
            show_image(axis, channel, *((-bound, bound, "gray") if name == "filters" else (low, high, "cividis")))
    return figure


def plot_doubts(predictions: Predictions) -> Figure:
    """A point for each digit: the mean of the answers' places on a circle, weighted by its softened probabilities."""
    labels, mistakes = predictions.split.labels, predictions.mistakes()
    angle = torch.empty(CLASSES)
    angle[CIRCLE_ORDER] = torch.arange(CLASSES) * 2 * math.pi / CLASSES
    places = torch.stack([angle.sin(), angle.cos()], 1)
    points = predictions.probabilities.log().clamp(min=-100).div(TEMPERATURE).softmax(1) @ places
    colors = COLORS(labels.numpy() % COLORS.N)
    figure, axis = chart((8, 8.4), f"Between the answers: {predictions.summary()}")
    axis.scatter(*points.t(), s=5, c=colors, linewidths=0, alpha=0.6)
    axis.scatter(
        *points[mistakes].t(), s=min(34, 4000 / max(1, len(mistakes))) + 4, c=colors[mistakes.numpy()],
        edgecolors="black", linewidths=1,
    )  # fmt: skip
    axis.scatter([], [], s=5, c=MUTED, label="a digit, in the colour of its label")
    axis.scatter([], [], s=34, c="white", edgecolors="black", label="misread, in the colour of its label")
    for digit, (x, y) in enumerate(1.08 * places):
        disc = {"boxstyle": "circle,pad=0.3", "facecolor": COLORS(digit % COLORS.N), "linewidth": 0}
        axis.text(float(x), float(y), str(digit), ha="center", va="center", weight="bold", color="white", bbox=disc)
    axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
    axis.set_xlabel("near a number: sure; elsewhere: at the mean of the numbers that it wavers between")
    axis.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def plot_images(originals: list[Image], digits: list[Tensor], reports: list[dict]) -> Figure:
    """Each image, its digits uint8 (N, 28, 28), and the least sure one's probabilities, from `photos.describe`."""
    across = min(2, len(reports))
    figure, axes = sheet(
        "What the network reads in your images",
        "The image, its 28x28 digits, and the probabilities of the least sure one",
        rows=math.ceil(len(reports) / across), columns=3 * across, panel=1.3, gap=(0.25, 0.55),
    )  # fmt: skip
    panels = axes.reshape(-1, 3)
    for (left, middle, right), original, shown, report in zip(panels, originals, digits, reports):
        name = report["path"][-20:].encode("utf-8", "replace").decode()  # only UTF-8 can be drawn
        show_image(left, original)
        left.set_title(name, loc="left", color=MUTED, parse_math=False)
        show_image(middle, torch.cat(list(shown), 1))
        doubt, number = report.get("second_guess"), report["number"]
        middle.set_xlabel(f"or perhaps {doubt}" if doubt else "", color=MUTED)
        caption(middle, f"reads {number}", "")
        least = min(report["digits"], key=lambda digit: digit["confidence"])
        right.set_axis_on()
        colors = [ACCENT if digit == least["digit"] else "0.7" for digit in range(CLASSES)]
        right.bar(range(CLASSES), least["probabilities"], color=colors)
        right.set(xticks=range(CLASSES), yticks=[], ylim=(0, 1))
        right.tick_params(length=0, labelsize=8)
        place = f"digit {report['digits'].index(least) + 1} of {len(shown)}" if len(shown) > 1 else ""
        right.set_title(f"{place}  {percent(least['confidence'])}".strip(), loc="right", color=MUTED)
    return figure


def grad_cam(model: Net, x: Tensor, digit: int) -> Tensor:
    """Where the last convolution wider than 1x1 sees `digit` in x (1, 1, 28, 28): (28, 28), >= 0.

    Grad-CAM (Selvaraju et al., 2017): the maps of its block, after the activation, are weighted by the mean gradient of
    the digit's logit over each map. Their sum is rectified and interpolated to the input's size.
    Raises UserError if no block has such a convolution.
    """

    def is_wide(module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1

    wide = [block for block in getattr(model, "blocks", []) if any(map(is_wide, block.modules()))]
    if not wide:
        raise UserError("no block has a convolution wider than 1x1")
    outputs = []
    with wide[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        logits = model(x)
    maps = outputs[-1]
    (gradients,) = torch.autograd.grad(logits[0, digit], maps)
    cam = F.relu((gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
    return F.interpolate(cam.detach(), x.shape[2:], mode="bilinear", align_corners=False)[0, 0]


def smooth_grad(model: nn.Module, x: Tensor, digit: int, samples: int = 100, noise: float = 0.2) -> Tensor:
    """How strongly each pixel of x (1, 1, 28, 28) changes the logit of `digit`: (28, 28), >= 0.

    SmoothGrad (Smilkov et al., 2017): the absolute value of the mean gradient over `samples` copies with Gaussian
    noise, whose standard deviation is `noise` times the image's range.
    """
    normal = torch.randn(samples, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    noisy = (x + noise * (x.max() - x.min()) * normal).requires_grad_()
    (gradients,) = torch.autograd.grad(model(noisy)[:, digit].sum(), noisy)
    return gradients.mean(0).abs()[0]


# --- Figures and panels ---


def chart(size: tuple[float, float], title: str, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of `size` inches with a title, and its axes: an array if there are several `columns`."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.1 / size[0], ha="left", color=INK)
    return figure, figure.subplots(1, columns)


def sheet(title: str, note: str, rows: int, columns: int, panel: float, gap: tuple) -> tuple[Figure, np.ndarray]:
    """Empty square panels (rows, columns) with a title and a grey note; `panel` and `gap` (across, down) in inches.

    It uses no layout engine, which takes minutes for hundreds of panels.
    """
    header, margin = 0.9 + 0.17 * note.count("\n"), 0.25
    width = 2 * margin + columns * (panel + gap[0]) - gap[0]
    height = header + rows * (panel + gap[1]) - gap[1] + margin
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, x=margin / width, y=1 - 0.18 / height, ha="left", va="top", color=INK)
    figure.text(margin / width, 1 - 0.43 / height, note, ha="left", va="top", color=MUTED)
    figure.subplots_adjust(
        left=margin / width, right=1 - margin / width, wspace=gap[0] / panel,
        bottom=margin / height, top=1 - header / height, hspace=gap[1] / panel,
    )  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def show_image(axis: Axes, image: Any, low: float = 0, high: float = 255, cmap: str = "Greys") -> None:
    """Show `image` in a thin frame without ticks; a digit (28, 28) is dark on white."""
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color="0.8", linewidth=0.6)
    axis.imshow(np.asarray(image), cmap=cmap, vmin=low, vmax=high)


def caption(axis: Axes, left: str, right: str) -> None:
    """A line above a panel: `left` in bold, `right` in grey."""
    axis.set_title(left, loc="left", fontweight="bold", color=INK)
    axis.set_title(right, loc="right", color=MUTED)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, atomically, and print its path and title."""
    with utils.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    print(f"{path}: {figure.get_suptitle()}", flush=True)


def draw_split(args: argparse.Namespace, model: Net, checkpoint: dict[str, Any], device: torch.device) -> int:
    """Draw all pictures of a checkpoint. Pictures that do not apply are named, and old files of them deleted."""
    split = utils.load_split(args.split, args.data_dir, checkpoint, device)
    predictions = predict_all(model, split, SPLITS[args.split], args.tta)
    model.cpu()  # where the data of the pictures is
    pictures = {
        "errors.png": partial(plot_errors, predictions, args.max),
        "confusion_matrix.png": partial(plot_confusion, predictions),
        "training_curves.png": partial(plot_history, checkpoint["history"], checkpoint["metrics"]),
        "explain.png": partial(plot_explanations, model, predictions),
        "filters.png": partial(plot_filters, model, predictions),
        "doubts.png": partial(plot_doubts, predictions),
    }
    for name, plot in pictures.items():
        path = args.out / name
        try:
            figure = plot()
        except UserError as error:
            path.unlink(missing_ok=True)
            print(f"{path}: not drawn, {error}")
        else:
            save(figure, path)
    return 0


def draw_images(args: argparse.Namespace, model: Net) -> int:
    """Draw the picture of the user's own images; returns the exit status, 1 if one of them cannot be read."""
    from extras import photos

    paths = photos.find_images(args.images)
    if len(paths) > args.max:
        print(f"Showing the first {args.max} of {len(paths):,} images; --max N shows more")
        paths = paths[: args.max]
    found = list(photos.read_files(model, paths))
    if found:
        originals, digits, reports = map(list, zip(*found))
        squares = [ImageOps.pad(original, (400, 400), color="white") for original in originals]
        save(plot_images(squares, digits, reports), args.out / "images.png")
    return 0 if len(found) == len(paths) else 1


def show_windows(folder: Path, pictures: str) -> None:
    """Show the `pictures` (a pattern) in `folder` in windows, until they are closed."""
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":
        utils.say("warning", "--show: no window can be opened here; the files are written all the same")
        return
    for path in sorted(folder.glob(pictures)):
        plt.figure(path.name).figimage(plt.imread(path), resize=True)
    plt.show()


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError for flags that do not go together."""
    parser = utils.Parser("Draw what the network misreads, how it learned and why it errs.")
    utils.add_common_flags(parser)
    utils.add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("plots"), metavar="DIR", help="folder of the pictures (default: %(default)s)")
    add("--max", type=number(int, 1), default=50, metavar="N",
        help="mistakes or images to show at most (default: %(default)s)")  # fmt: skip
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="draw only images.png: what the network reads in these images or folders of images")  # fmt: skip
    add("--show", action="store_true", help="also open windows")
    args = parser.parse_args(argv)
    utils.refuse_unused(parser, args, "images", ("split", "data_dir", "tta"))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    device = utils.choose_device(args.device)
    model, checkpoint = utils.load_model(args.checkpoint, device)
    with matplotlib.style.context(["default", STYLE]):
        status = draw_images(args, model) if args.images else draw_split(args, model, checkpoint, device)
    if args.show:
        show_windows(args.out, "images.png" if args.images else "*.png")
    return status


if __name__ == "__main__":
    utils.run_script(main)
