"""Draw what the network misreads, how it learned and why it errs. All flags: `python visualize_errors.py --help`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageOps
from torch import Tensor

import utils
from model import Net
from test_model import classify, find_images, read_digits
from utils import Split, UserError, at_least

EXPLAINED = 8  # mistakes in explain.png
MAPS_SHOWN = 24  # feature maps of a block in filters.png; wider networks have more
ACCURACY_TICKS = (10, 20, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 100)
INK, ACCENT, MUTED = "0.15", "#d55e00", "0.45"
STYLE = {
    "font.size": 9, "axes.titlesize": 8.5, "axes.titlepad": 4, "figure.titlesize": 11, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6", "axes.labelcolor": "0.25",
    "xtick.color": "0.4", "ytick.color": "0.4", "legend.frameon": False, "savefig.dpi": 150,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
}  # fmt: skip
# Ten colours that colour-blind readers can tell apart (Petroff, "Accessible Color Sequences", 2021).
DIGIT_COLORS = np.array(["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
                         "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"])  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw what the network misreads, how it learned and why it errs.")
    utils.add_common_flags(parser)
    utils.add_checkpoint_flag(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("plots"), metavar="DIR", help="(default: %(default)s)")
    add("--max", type=at_least(1), default=50, metavar="N",
        help="mistakes or images to show at most (default: %(default)s)")  # fmt: skip
    add("--explain", action="store_true", help="also draw explain.png, filters.png and embedding.png")
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="draw only images.png: what the network reads in these images or folders of images")  # fmt: skip
    add("--show", action="store_true", help="also open windows")
    args = parser.parse_args()
    if args.images and args.explain:
        raise UserError("--images does not go with --explain")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What there is to draw


class Reading(NamedTuple):
    """A split and what the network makes of it, on the CPU."""

    split: Split
    predicted: Tensor  # digits (N,)
    confidence: Tensor  # probabilities of the predicted digits (N,)
    features: Tensor  # what the last layer sees (N, D)

    def mistakes(self) -> Tensor:
        """Indices of the misread digits, most confident mistake first."""
        wrong = (self.predicted != self.split.labels).nonzero().squeeze(1)
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)]

    def summary(self) -> str:
        """How many digits are misread, in words."""
        return f"{len(self.mistakes()):,} of {len(self.predicted):,} test digits misread"


def read(model: Net, split: Split) -> Reading:
    """Run `model` over `split`, on the device of both."""
    features = []
    with model.fc2.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0])):
        logits = utils.predict(model, split)
    confidence, predicted = logits.softmax(1).cpu().max(1)
    return Reading(Split(split.images.cpu(), split.labels.cpu()), predicted, confidence, torch.cat(features).cpu())


def read_history(path: Path) -> list[dict[str, float]]:
    """The entries that train.py wrote, one an epoch; UserError if the file holds anything else."""
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        needed = {"epoch", "learning_rate", "train_loss", "train_accuracy", *history[-1]}
        if not all(math.isfinite(entry[name]) for entry in history for name in needed):
            raise ValueError("not finite")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} is damaged or not a history of train.py; delete it or train again") from error
    return history


def network_input(image: Tensor) -> Tensor:
    """An image uint8 (1, 28, 28) as a batch of one, float (1, 1, 28, 28)."""
    return utils.normalize(image.unsqueeze(0) / 255)


def grad_cam(model: Net, x: Tensor, digit: int) -> Tensor:
    """Where the last convolution wider than 1x1 finds what speaks for `digit` in x (1, 1, 28, 28): (28, 28), >= 0.

    Grad-CAM (Selvaraju et al., 2017): the feature maps of its block, after the activation, weighted by the mean
    gradient of the digit's logit over each map, summed, rectified and interpolated to the input's size.
    """
    block = [block for block in model.blocks if max(block.conv.kernel_size) > 1][-1]
    outputs = []
    with block.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        logits = model(x)
    (maps,) = outputs
    (gradients,) = torch.autograd.grad(logits[0, digit], maps)
    cam = F.relu((gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
    return F.interpolate(cam.detach(), x.shape[2:], mode="bilinear", align_corners=False)[0, 0]


def smooth_grad(model: nn.Module, x: Tensor, digit: int, samples: int = 100, noise: float = 0.2) -> Tensor:
    """How strongly each pixel of x (1, 1, 28, 28) moves the logit of `digit`: (28, 28), >= 0.

    SmoothGrad (Smilkov et al., 2017): the gradient averaged over `samples` copies with Gaussian noise of
    standard deviation `noise` times the image's range, then its absolute value.
    """
    normal = torch.randn(samples, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    noisy = (x + noise * (x.max() - x.min()) * normal).requires_grad_()
    (gradients,) = torch.autograd.grad(model(noisy)[:, digit].sum(), noisy)
    return gradients.mean(0).abs()[0]


def pca(features: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of `features` (N, D): coordinates (N, 2), shares of the variance (2,)."""
    centred = features - features.mean(0)
    _, s, axes = torch.linalg.svd(centred, full_matrices=False)
    variances = s**2
    return centred @ axes[:2].t(), variances[:2] / variances.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Figures and panels


def chart(size: tuple[float, float], title: str, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of `size` inches under a title, and its axes, or an array of them if there are several `columns`."""
    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained")
    figure.suptitle(title, x=0.1 / size[0], ha="left", color=INK)
    return figure, axes


def sheet(
    title: str, note: str, rows: int, columns: int, panel: float, gap: tuple[float, float]
) -> tuple[Figure, np.ndarray]:
    """Blank square panels (rows, columns) under a title and a grey note; `panel` and `gap` (across, down) in inches.

    No layout engine: with hundreds of panels it would take minutes.
    """
    header, margin = 0.9, 0.25
    width = 2 * margin + columns * (panel + gap[0]) - gap[0]
    height = header + rows * (panel + gap[1]) - gap[1] + margin
    figure = plt.figure(figsize=(width, height))
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
    """Draw `image` in a thin frame without ticks; a digit (28, 28) is dark on white."""
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color="0.8", linewidth=0.6)
    axis.imshow(np.asarray(image), cmap=cmap, vmin=low, vmax=high)


def caption(axis: Axes, left: str, right: str) -> None:
    """One line above a panel: what it is in bold, a number in grey."""
    axis.set_title(left, loc="left", fontweight="bold", color=INK)
    axis.set_title(right, loc="right", color=MUTED)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def plot_errors(reading: Reading, limit: int) -> Figure:
    """The misread digits, `limit` at most, each with label, prediction and confidence."""
    shown = reading.mistakes()[:limit].tolist()
    figure, axes = sheet(
        reading.summary(),
        f"The {len(shown):,} most confident mistakes: true label → prediction, and the confidence in it",
        rows=max(1, math.ceil(len(shown) / 10)), columns=10, panel=0.95, gap=(0.14, 0.3),
    )  # fmt: skip
    for axis, i in zip(axes.flat, shown):
        show_image(axis, reading.split.images[i, 0])
        caption(axis, f"{reading.split.labels[i]} → {reading.predicted[i]}", f"{reading.confidence[i]:.1%}")
    return figure


def plot_confusion(reading: Reading) -> Figure:
    """The confusion matrix; colour is for the mistakes alone, which the diagonal would drown."""
    counts = utils.confusion_matrix(reading.predicted, reading.split.labels).numpy()
    wrong = np.ma.masked_array(counts, np.eye(10))
    most = wrong.max()
    true, read_as = np.unravel_index(wrong.argmax(), wrong.shape)
    worst = f", most often {true} as {read_as} ({most:,})" if most else ""

    figure, axis = chart((6.9, 7.2), reading.summary() + worst)
    axis.set_facecolor("0.9")  # of the diagonal
    axis.imshow(wrong, cmap="Blues", vmin=0, vmax=max(most, 1))
    for row, column in np.argwhere(counts):
        count = counts[row, column]
        color = "white" if count > 0.6 * most else INK  # on dark and on light blue
        if row == column:
            color = MUTED
        axis.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    axis.set(xticks=range(10), yticks=range(10), xlabel="prediction", ylabel="true digit")
    axis.hlines(np.arange(-0.5, 10), -0.5, 9.5, color="0.85", linewidth=0.6)
    axis.vlines(np.arange(-0.5, 10), -0.5, 9.5, color="0.85", linewidth=0.6)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def plot_history(history: list[dict[str, float]]) -> Figure:
    """Learning rate, loss and accuracy by epoch; loss and errors shrink by orders of magnitude, hence logarithms."""
    last = history[-1]
    kind, part = ("Validation", "val") if "val_loss" in last else ("Training", "train")
    final = f"accuracy {last[f'{part}_accuracy']:.2f}% and loss {last[f'{part}_loss']:.4f}"
    figure, axes = chart((10, 3.4), f"{kind} {final} after epoch {last['epoch']:,}", columns=3)

    def draw(axis: Axes, name: str, style: str, color: str, label: str) -> None:
        if name in last:
            epochs, values = zip(*((entry["epoch"], entry[name]) for entry in history))
            axis.plot(epochs, values, style, color=color, label=label, markersize=3, linewidth=1.3)

    draw(axes[0], "learning_rate", "o-", INK, "")
    for axis, quantity in zip(axes[1:], ("loss", "accuracy")):
        draw(axis, f"train_{quantity}", "o-", INK, "training (augmented)")
        draw(axis, f"val_{quantity}", "s--", ACCENT, "validation")
    for axis, label in zip(axes, ("learning rate at the epoch's start", "cross-entropy loss", "accuracy (%)")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.grid(axis="y", color="0.92")

    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[1].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    to_axis, from_axis = lambda y: -np.log(np.maximum(100.01 - y, 1e-9)), lambda t: 100.01 - np.exp(-t)
    axes[2].set_yscale("function", functions=(to_axis, from_axis))
    axes[2].yaxis.set(major_locator=FixedLocator(ACCURACY_TICKS), major_formatter="{x:g}")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="upper right", ncols=2)
    return figure


def plot_explanations(model: Net, reading: Reading) -> Figure:
    """Grad-CAM and SmoothGrad of the most confident mistakes, for the true and for the predicted digit."""
    mistakes = reading.mistakes()
    shown = mistakes[:EXPLAINED].tolist()
    figure, axes = sheet(
        f"What speaks for the true and for the predicted digit: {len(shown)} of {len(mistakes):,} mistakes, "
        "most confident first",
        "Grad-CAM: what the last convolution wider than 1x1 finds for a digit. SmoothGrad: the pixels that move its "
        "score. Bright is strong, on one scale for both digits",
        rows=max(1, math.ceil(len(shown) / 2)), columns=10, panel=1.05, gap=(0.16, 0.32),
    )  # fmt: skip
    for panels, i in zip(axes.reshape(-1, 5), shown):
        image = reading.split.images[i]
        digits = int(reading.split.labels[i]), int(reading.predicted[i])
        show_image(panels[0], image[0])
        caption(panels[0], f"{digits[0]} → {digits[1]}", f"{reading.confidence[i]:.1%}")
        for name, method, pair in (("Grad-CAM", grad_cam, panels[1:3]), ("SmoothGrad", smooth_grad, panels[3:5])):
            heats = torch.stack([method(model, network_input(image), digit) for digit in digits])
            top = float(heats.quantile(0.99))  # not the maximum, after the SmoothGrad paper: single pixels stand out
            for axis, digit, heat in zip(pair, digits, heats):
                show_image(axis, heat, 0, top, "cividis")
                contour = axis.contour(image[0].numpy(), levels=[100], colors="white", linewidths=0.9)
                contour.set_path_effects([withStroke(linewidth=2, foreground="0.2")])  # seen on dark and bright ground
                axis.set_title(f"{name}: {digit}", loc="left", color=MUTED)
    return figure


def plot_filters(model: Net, reading: Reading) -> Figure:
    """The first layer's filters, and the output of each block for the first test digit."""
    image, label = reading.split.images[0], reading.split.labels[0]
    filters = model.blocks[0].conv.weight.detach()[:, 0]
    groups = {"filters": filters}
    x = network_input(image)
    for i, block in enumerate(model.blocks, 1):
        x = block(x).detach()
        groups[f"block {i}"] = x[0]
    heights = [math.ceil(min(len(maps), MAPS_SHOWN) / 12) for maps in groups.values()]
    figure, axes = sheet(
        f"The {len(filters)} learned filters of the first layer, and what each block makes of one {label}",
        "Filters: grey is 0, black negative, white positive. Maps: dark is weak, bright is strong, on one scale for "
        "each block",
        rows=1 + sum(heights), columns=13, panel=0.72, gap=(0.08, 0.12),
    )  # fmt: skip

    def words(row: int, text: str) -> None:
        axes[row, 0].text(0, 0.5, text, va="center", transform=axes[row, 0].transAxes)

    words(0, f"test digit\nread as {reading.predicted[0]}")
    show_image(axes[0, 1], image[0])
    row = 1
    for (name, maps), height in zip(groups.items(), heights):
        some = f"\n{MAPS_SHOWN} of {len(maps)}" if len(maps) > MAPS_SHOWN else ""
        words(row, f"{name}\n{maps.shape[1]}x{maps.shape[2]}{some}")
        bound = float(maps.abs().max())
        scale = (-bound, bound, "gray") if maps is filters else (float(maps.min()), bound, "cividis")
        for axis, channel in zip(axes[row : row + height, 1:].flat, maps):
            show_image(axis, channel, *scale)
        row += height
    return figure


def plot_embedding(reading: Reading) -> Figure:
    """The features before the last layer in two dimensions, coloured by digit."""
    labels, mistakes = reading.split.labels, reading.mistakes()
    points, shares = pca(reading.features)
    colors = DIGIT_COLORS[labels]
    title = f"{len(labels):,} test digits, {len(mistakes):,} of them misread (ringed): "
    figure, axis = chart((8, 7), f"{title}{reading.features.shape[1]} features in two dimensions")
    axis.scatter(*points.t(), s=5, c=colors, linewidths=0, alpha=0.6)
    axis.scatter(*points[mistakes].t(), s=34, c=colors[mistakes], edgecolors="black", linewidths=1.1)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    axis.set_ylabel(f"second principal component ({shares[1]:.0%} of the variance)")
    for digit in labels.unique().tolist():
        axis.text(
            *points[labels == digit].median(0).values.tolist(), str(digit), ha="center", va="center", fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": DIGIT_COLORS[digit], "linewidth": 2},
        )  # fmt: skip
    return figure


def plot_images(names: list[str], originals: list[Image.Image], digits: Tensor, probabilities: Tensor) -> Figure:
    """Each image as it was, as the network sees it, uint8 (N, 28, 28), and its probabilities (N, 10)."""
    across = min(2, len(names))
    figure, axes = sheet(
        "What the network reads in your images",
        "The image, its 28x28 digit, and the probability of each digit",
        rows=math.ceil(len(names) / across), columns=3 * across, panel=1.3, gap=(0.25, 0.55),
    )  # fmt: skip
    for panels, name, original, digit, p in zip(axes.reshape(-1, 3), names, originals, digits, probabilities):
        left, middle, right = panels
        show_image(left, original)
        left.set_title(name, loc="left", color=MUTED, parse_math=False)
        show_image(middle, digit)
        best = int(p.argmax())
        right.set_axis_on()
        right.bar(range(10), p.numpy(), color=[ACCENT if k == best else "0.7" for k in range(10)])
        right.set(xticks=range(10), yticks=[], ylim=(0, 1))
        right.tick_params(length=0, labelsize=8)
        caption(right, f"reads {best}", f"{p[best]:.1%}")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The command


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, whole or not at all, and print its path and title."""
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    print(f"{path}: {figure.get_suptitle()}", flush=True)


def draw_errors(args: argparse.Namespace, model: Net, metrics: dict[str, float], device: torch.device) -> None:
    """The pictures of the test set, of the training and, with --explain, of the network's reasons.

    The training's curves are drawn where history.json ends in the checkpoint's own `metrics`.
    """
    history_path = args.checkpoint.with_name("history.json")
    history = read_history(history_path) if history_path.exists() else None
    reading = read(model, utils.load_mnist(args.data_dir, train=False, device=device))

    save(plot_errors(reading, args.max), args.out / "errors.png")
    save(plot_confusion(reading), args.out / "confusion_matrix.png")
    curves = args.out / "training_curves.png"
    if not history:
        print(f"{curves}: skipped, there is no {history_path}")
    elif history[-1]["train_loss"] != metrics.get("train_loss"):
        print(f"{curves}: skipped, {history_path} belongs to another training than {args.checkpoint.name}")
    else:
        save(plot_history(history), curves)
    if args.explain:
        model.cpu()  # where the rest of the pictures' data is, and a few digits are read as fast
        save(plot_explanations(model, reading), args.out / "explain.png")
        save(plot_filters(model, reading), args.out / "filters.png")
        save(plot_embedding(reading), args.out / "embedding.png")


def draw_images(args: argparse.Namespace, model: Net) -> int:
    """The picture of the user's own images; returns the exit status, 1 if one of them cannot be read."""
    paths = find_images(args.images)
    if len(paths) > args.max:
        print(f"Showing the first {args.max} of {len(paths):,} images; --max N shows more")
        paths = paths[: args.max]
    names, originals, digits = [], [], []
    for path, original, digit in read_digits(paths):
        name = path.name.encode("utf-8", "replace").decode()  # as bytes that are not UTF-8 cannot be drawn
        names.append(name if len(name) <= 30 else f"…{name[-29:]}")
        originals.append(ImageOps.pad(original, (400, 400), color="white"))
        digits.append(digit)
    if digits:
        prepared = torch.stack(digits)
        save(plot_images(names, originals, prepared, classify(model, prepared)), args.out / "images.png")
    return 0 if len(digits) == len(paths) else 1


def main() -> int:
    args = parse_args()
    device = utils.choose_device(args.device)
    if not args.show:
        matplotlib.use("Agg")
    windows = matplotlib.get_backend().lower() != "agg"
    if args.show and not windows:
        utils.warn("--show: no window can be opened here; the files are written all the same")
    plt.style.use(["default", STYLE])
    model, checkpoint = utils.load_model(args.checkpoint, device)
    status = 0
    if args.images:
        status = draw_images(args, model)
    else:
        draw_errors(args, model, checkpoint["metrics"], device)
    if windows:
        plt.show()
    return status


if __name__ == "__main__":
    utils.run_script(main)
