"""Draw what the network misreads, how it learned and why it errs. All flags: `python visualize_errors.py --help`."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
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
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageOps
from torch import Tensor

import utils
from model import CLASSES, Net
from test_model import classify, digits_to_text, find_images, folder_label, read_numbers, second_guess
from utils import SPLITS, Split, UserError, at_least

EXPLAINED = 8  # mistakes in explain.png
MAPS_SHOWN = 24  # feature maps of a block in filters.png; wider networks have more
INK, ACCENT, SECOND, MUTED = "0.15", "#d55e00", "#0072b2", "0.45"
STYLE = {
    "font.size": 9, "axes.titlesize": 8.5, "axes.titlepad": 4, "figure.titlesize": 11, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6", "axes.labelcolor": "0.25",
    "xtick.color": "0.4", "ytick.color": "0.4", "legend.frameon": False, "savefig.dpi": 150,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
}  # fmt: skip
# Ten colours that colour-blind readers can tell apart (Petroff, "Accessible Color Sequences", 2021).
DIGIT_COLORS = np.array(["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
                         "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"])  # fmt: skip


class Predictions(NamedTuple):
    """A split and what the network makes of it, on the CPU."""

    split: Split
    name: str  # of the split, in words
    predicted: Tensor  # digits (N,)
    confidence: Tensor  # probabilities of the predicted digits (N,)

    def mistakes(self) -> Tensor:
        """Indices of the misread digits, most confident mistake first."""
        wrong = (self.predicted != self.split.labels).nonzero().squeeze(1)
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)]

    def summary(self) -> str:
        """How many digits are misread, in words."""
        return f"{len(self.mistakes()):,} of {len(self.predicted):,} {self.name} digits misread"


def predict_all(model: Net, split: Split, name: str) -> Predictions:
    """Run `model` over `split`, called `name` in words, on the device of both."""
    confidence, predicted = utils.predict(model, split.images).softmax(1).cpu().max(1)
    return Predictions(Split(split.images.cpu(), split.labels.cpu()), name, predicted, confidence)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def plot_errors(predictions: Predictions, limit: int) -> Figure:
    """The misread digits, `limit` at most, each with label, prediction and confidence."""
    shown = predictions.mistakes()[:limit].tolist()
    figure, axes = sheet(
        predictions.summary(),
        f"The {len(shown):,} most confident mistakes: true label → prediction, and the confidence in it",
        rows=max(1, math.ceil(len(shown) / 10)), columns=10, panel=0.95, gap=(0.14, 0.3),
    )  # fmt: skip
    for axis, i in zip(axes.flat, shown):
        show_image(axis, predictions.split.images[i, 0])
        caption(axis, f"{predictions.split.labels[i]} → {predictions.predicted[i]}", f"{predictions.confidence[i]:.1%}")
    return figure


def plot_confusion(predictions: Predictions) -> Figure:
    """The confusion matrix; colour is for the mistakes alone, which the diagonal would drown."""
    counts = utils.confusion_matrix(predictions.predicted, predictions.split.labels).numpy()
    wrong = np.ma.masked_array(counts, np.eye(CLASSES))
    most = wrong.max()
    true, read_as = np.unravel_index(wrong.argmax(), wrong.shape)
    worst = f", most often {true} as {read_as} ({most:,})" if most else ""

    figure, axis = chart((6.9, 7.2), predictions.summary() + worst)
    axis.set_facecolor("0.9")  # of the diagonal
    axis.imshow(wrong, cmap="Blues", vmin=0, vmax=max(most, 1))
    for row, column in np.argwhere(counts):
        count = counts[row, column]
        color = "white" if count > 0.6 * most else INK  # on dark and on light blue
        if row == column:
            color = MUTED
        axis.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    axis.set(xticks=range(CLASSES), yticks=range(CLASSES), xlabel="prediction", ylabel="true digit")
    axis.hlines(np.arange(CLASSES) - 0.5, -0.5, CLASSES - 0.5, color="0.85", linewidth=0.6)
    axis.vlines(np.arange(CLASSES) - 0.5, -0.5, CLASSES - 0.5, color="0.85", linewidth=0.6)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def plot_history(history: list[dict[str, float]], metrics: dict[str, float]) -> Figure:
    """Learning rate, loss and error by epoch, and behind the last one what the test set said, if it was read."""
    last, count = {**history[-1], **metrics}, len(history)
    part = next(part for part in ("test", "val", "train") if f"{part}_loss" in last)
    figure, axes = chart(
        (10, 3.7),
        f"{SPLITS[part].capitalize()} accuracy {last[f'{part}_accuracy']:.2f}% and loss {last[f'{part}_loss']:.4f} "
        f"after {count:,} epoch{'s' * (count > 1)}",
        columns=3,
    )  # fmt: skip
    epochs = np.array([entry["epoch"] for entry in history])
    thinned = np.array([entry["dropout_factor"] > 0 for entry in history])
    axes[0].plot(epochs, [entry["learning_rate"] for entry in history], "o-", color=INK, markersize=4, linewidth=1.2)
    axes[0].set_ylim(bottom=0)
    for axis, quantity in zip(axes[1:], ("loss", "accuracy")):

        def curve(part: str, entries: list[dict[str, float]], name: str = quantity) -> np.ndarray:
            values = np.array([entry[f"{part}_{name}"] for entry in entries])
            return values if name == "loss" else 100 - values

        train = curve("train", history)
        draw = partial(axis.plot, markersize=4, linewidth=1.2)
        draw(epochs, train, color=INK)
        if thinned.any():
            label = "training: augmented, thinned by dropout"
            draw(epochs[thinned], train[thinned], "o", color=INK, markerfacecolor="white", label=label)
        if not thinned.all():
            draw(epochs[~thinned], train[~thinned], "o", color=INK, label="training: augmented, hard images more often")
        if "val_loss" in last:
            draw(epochs, curve("val", history), "s--", color=ACCENT, label="validation")
        if metrics:
            draw(epochs[-1:], curve("test", [metrics]), "D", color=SECOND, label="test, after the last epoch")
        log_axis(axis, np.concatenate([line.get_ydata() for line in axis.lines]))
    for axis, label in zip(axes, ("learning rate at the epoch's start", "cross-entropy loss", "error (%)")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.grid(axis="y", color="0.92")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def log_axis(axis: Axes, values: np.ndarray) -> None:
    """Make y logarithmic, with room around `values`, a decade at least, and ticks at 1, 2, 5."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    middle = math.sqrt(low * high)
    axis.set_yscale("log")
    axis.set_ylim(min(low / 1.3, middle / 3.2), max(high * 1.3, middle * 3.2))
    axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")


def plot_explanations(model: Net, predictions: Predictions) -> Figure:
    """Grad-CAM and SmoothGrad of the most confident mistakes, for the true and for the predicted digit."""
    mistakes = predictions.mistakes()
    shown = mistakes[:EXPLAINED].tolist()
    figure, axes = sheet(
        f"What speaks for the true and for the predicted digit: {len(shown)} of {len(mistakes):,} mistakes, "
        "most confident first",
        "Grad-CAM: what the last convolution wider than 1x1 finds for a digit. SmoothGrad: the pixels that move its "
        "score. Bright is strong, on one scale for both digits",
        rows=max(1, math.ceil(len(shown) / 2)), columns=10, panel=1.05, gap=(0.16, 0.32),
    )  # fmt: skip
    for panels, i in zip(axes.reshape(-1, 5), shown):
        image = predictions.split.images[i]
        digits = int(predictions.split.labels[i]), int(predictions.predicted[i])
        show_image(panels[0], image[0])
        caption(panels[0], f"{digits[0]} → {digits[1]}", f"{predictions.confidence[i]:.1%}")
        for name, method, pair in (("Grad-CAM", grad_cam, panels[1:3]), ("SmoothGrad", smooth_grad, panels[3:5])):
            heats = torch.stack([method(model, image.unsqueeze(0) / 255, digit) for digit in digits])
            top = float(heats.quantile(0.99))  # not the maximum, after the SmoothGrad paper: single pixels stand out
            for axis, digit, heat in zip(pair, digits, heats):
                show_image(axis, heat, 0, top, "cividis")
                contour = axis.contour(image[0].numpy(), levels=[100], colors="white", linewidths=0.9)
                contour.set_path_effects([withStroke(linewidth=2, foreground="0.2")])  # seen on dark and bright ground
                axis.set_title(f"{name}: {digit}", loc="left", color=MUTED)
    return figure


def plot_filters(model: Net, predictions: Predictions) -> Figure:
    """The first layer's filters, and the output of each block for the first digit; UserError without convolution."""
    image, label = predictions.split.images[0], predictions.split.labels[0]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise UserError("the network has no convolution")
    filters = convolutions[0].weight.detach()[:, 0]
    groups = {"filters": filters}
    x = image.unsqueeze(0) / 255
    for i, block in enumerate(blocks_of(model), 1):
        x = block(x).detach()
        if x.dim() == 4:
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

    words(0, f"{predictions.name} digit\nread as {predictions.predicted[0]}")
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


def plot_embedding(model: Net, predictions: Predictions) -> Figure:
    """The features before the last linear layer in two dimensions, coloured by digit; UserError if there is none."""
    labels, mistakes = predictions.split.labels, predictions.mistakes()
    features = last_features(model, predictions.split.images)
    points, shares = pca(features)
    colors = DIGIT_COLORS[labels % len(DIGIT_COLORS)]
    title = f"{len(labels):,} {predictions.name} digits, {len(mistakes):,} of them misread (ringed): "
    figure, axis = chart((8, 7), f"{title}{features.shape[1]} features in two dimensions")
    axis.scatter(*points.t(), s=5, c=colors, linewidths=0, alpha=0.6)
    axis.scatter(*points[mistakes].t(), s=34, c=colors[mistakes], edgecolors="black", linewidths=1.1)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    axis.set_ylabel(f"second principal component ({shares[1]:.0%} of the variance)")
    for digit in labels.unique().tolist():
        color = DIGIT_COLORS[digit % len(DIGIT_COLORS)]
        axis.text(
            *points[labels == digit].median(0).values.tolist(), str(digit), ha="center", va="center", fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": color, "linewidth": 2},
        )  # fmt: skip
    return figure


def plot_images(
    names: list[str],
    labels: list[str | None],
    originals: list[Image.Image],
    digits: Sequence[Tensor],
    probabilities: Sequence[Tensor],
) -> Figure:
    """Each image as it was, its digits as the network sees them, uint8 (N, 28, 28), and the probabilities (N, 10).

    A number's digits stand side by side. Where the number read is not the label, the caption has both, as in
    errors.png; below the digits of an unsure one stands the second guess.
    """
    across = min(2, len(names))
    figure, axes = sheet(
        "What the network reads in your images",
        "The image, its 28x28 digits, and the probabilities of the least sure one; of misread ones: label → prediction",
        rows=math.ceil(len(names) / across), columns=3 * across, panel=1.3, gap=(0.25, 0.55),
    )  # fmt: skip
    for (left, middle, right), name, label, original, its_digits, shares in zip(
        axes.reshape(-1, 3), names, labels, originals, digits, probabilities
    ):
        show_image(left, original)
        left.set_title(name, loc="left", color=MUTED, parse_math=False)
        show_image(middle, torch.cat(list(its_digits), 1))
        number, doubt = digits_to_text(shares.argmax(1)), second_guess(shares)
        middle.set_xlabel(f"or perhaps {doubt}" if doubt else "", color=MUTED)
        p = shares[shares.amax(1).argmin()]
        best = int(p.argmax())
        right.set_axis_on()
        right.bar(range(CLASSES), p.numpy(), color=[ACCENT if k == best else "0.7" for k in range(CLASSES)])
        right.set(xticks=range(CLASSES), yticks=[], ylim=(0, 1))
        right.tick_params(length=0, labelsize=8)
        read = f"reads {number}" if label in (None, number) else f"{label} → {number}"
        caption(right, read if len(number) == 1 else "", f"{p[best]:.1%}")
        caption(middle, read if len(number) > 1 else "", "")  # where a number has room
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# What the pictures of the network's reasons show


def grad_cam(model: Net, x: Tensor, digit: int) -> Tensor:
    """Where the last convolution wider than 1x1 finds what speaks for `digit` in x (1, 1, 28, 28): (28, 28), >= 0.

    Grad-CAM (Selvaraju et al., 2017): the feature maps of its block, after the activation, weighted by the mean
    gradient of the digit's logit over each map, summed, rectified and interpolated to the input's size.
    Raises UserError where no block has such a convolution.
    """
    wide = [block for block in blocks_of(model) if any(is_wide(module) for module in block.modules())]
    if not wide:
        raise UserError("no block has a convolution wider than 1x1")
    outputs = []
    with wide[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        logits = model(x)
    maps = outputs[-1]
    (gradients,) = torch.autograd.grad(logits[0, digit], maps)
    cam = F.relu((gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
    return F.interpolate(cam.detach(), x.shape[2:], mode="bilinear", align_corners=False)[0, 0]


def blocks_of(model: nn.Module) -> nn.Module:
    """The network's blocks; UserError if it has none."""
    if not hasattr(model, "blocks"):
        raise UserError("the network has no self.blocks")
    return model.blocks


def is_wide(module: nn.Module) -> bool:
    """Whether `module` is a convolution wider than 1x1."""
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1


def smooth_grad(model: nn.Module, x: Tensor, digit: int, samples: int = 100, noise: float = 0.2) -> Tensor:
    """How strongly each pixel of x (1, 1, 28, 28) moves the logit of `digit`: (28, 28), >= 0.

    SmoothGrad (Smilkov et al., 2017): the gradient averaged over `samples` copies with Gaussian noise of
    standard deviation `noise` times the image's range, then its absolute value.
    """
    normal = torch.randn(samples, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    noisy = (x + noise * (x.max() - x.min()) * normal).requires_grad_()
    (gradients,) = torch.autograd.grad(model(noisy)[:, digit].sum(), noisy)
    return gradients.mean(0).abs()[0]


def last_features(model: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer sees of uint8 images (N, 1, 28, 28): float (N, D); UserError if there is none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UserError("the network has no linear layer")
    features = []
    with layers[-1].register_forward_pre_hook(lambda module, inputs: features.append(inputs[0])):
        utils.predict(model, images)
    return torch.cat(features)


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
# The command


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, whole or not at all, and print its path and title."""
    with utils.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    print(f"{path}: {figure.get_suptitle()}", flush=True)


def draw_split(args: argparse.Namespace, model: Net, checkpoint: dict[str, Any], device: torch.device) -> None:
    """All pictures of a checkpoint; of what it cannot have, a line that says so, and none of another network stays."""
    split = utils.load_split(args.split, args.data_dir, checkpoint, device)
    predictions = predict_all(model, split, SPLITS[args.split])
    model.cpu()  # where the pictures' data is; a few digits are read as fast
    pictures = {
        "errors.png": partial(plot_errors, predictions, args.max),
        "confusion_matrix.png": partial(plot_confusion, predictions),
        "training_curves.png": partial(plot_history, checkpoint["history"], checkpoint["metrics"]),
        "explain.png": partial(plot_explanations, model, predictions),
        "filters.png": partial(plot_filters, model, predictions),
        "embedding.png": partial(plot_embedding, model, predictions),
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


def draw_images(args: argparse.Namespace, model: Net) -> int:
    """The picture of the user's own images; returns the exit status, 1 if one of them cannot be read."""
    paths = find_images(args.images)
    if len(paths) > args.max:
        print(f"Showing the first {args.max} of {len(paths):,} images; --max N shows more")
        paths = paths[: args.max]
    found = list(read_numbers(paths))
    repeated = Counter(path.name for path in paths)
    names = [f"{path.parent.name}/{path.name}" if repeated[path.name] > 1 else path.name for path, _, _ in found]
    names = [name.encode("utf-8", "replace").decode() for name in names]  # bytes that are not UTF-8 cannot be drawn
    names = [name if len(name) <= 30 else f"…{name[-29:]}" for name in names]
    if found:
        digits = [digits for _, _, digits in found]
        originals = [ImageOps.pad(original, (400, 400), color="white") for _, original, _ in found]
        labels = [folder_label(path) for path, _, _ in found]
        probabilities = classify(model, torch.cat(digits)).split(list(map(len, digits)))
        save(plot_images(names, labels, originals, digits, probabilities), args.out / "images.png")
    return 0 if len(found) == len(paths) else 1


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw what the network misreads, how it learned and why it errs.")
    utils.add_common_flags(parser)
    utils.add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("plots"), metavar="DIR", help="folder of the pictures (default: %(default)s)")
    add("--max", type=at_least(1), default=50, metavar="N",
        help="mistakes or images to show at most (default: %(default)s)")  # fmt: skip
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="draw only images.png: what the network reads in these images or folders of images")  # fmt: skip
    add("--show", action="store_true", help="also open windows")
    return parser.parse_args()


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
        draw_split(args, model, checkpoint, device)
    if windows:
        plt.show()
    return status


if __name__ == "__main__":
    utils.run_script(main)
