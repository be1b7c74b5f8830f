"""Draw what the network misreads, how it learned and why it errs. All flags: `python visualize_errors.py --help`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from test_model import classify, find_images, read_digit
from utils import Split, UserError, at_least

EXPLAINED = 8  # mistakes in explain.png
ACCURACY_TICKS = (10, 20, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 100)
MAPS_SHOWN = 24  # feature maps of a block in filters.png; wider networks have more
INK, ACCENT, MUTED = "0.15", "#d55e00", "0.45"
STYLE = {
    "font.size": 9, "axes.titlesize": 8.5, "axes.titlepad": 4, "figure.titlesize": 11, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6", "axes.labelcolor": "0.25",
    "xtick.color": "0.4", "ytick.color": "0.4", "legend.frameon": False, "savefig.dpi": 150,
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
        parser.error("--images does not go with --explain")
    return args


class Reading(NamedTuple):
    """A split on the CPU, what the network reads in it, and its confidence in that: all (N,)."""

    split: Split
    predicted: Tensor
    confidence: Tensor

    def mistakes(self) -> Tensor:
        """Indices of the misread digits, most confident mistake first."""
        wrong = (self.predicted != self.split.labels).nonzero().squeeze(1)
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)]

    def summary(self) -> str:
        """How many digits are misread, in words."""
        wrong = len(self.mistakes())
        return f"{f'{wrong:,}' if wrong else 'None'} of {len(self.predicted):,} test digits misread"


def read(model: Net, split: Split) -> Reading:
    """Run `model` over `split`."""
    confidence, predicted = utils.predict(model, split).softmax(1).cpu().max(1)
    return Reading(Split(split.images.cpu(), split.labels.cpu()), predicted, confidence)


def read_history(path: Path) -> list[dict[str, float]]:
    """The entries that train.py wrote, one an epoch; UserError if the file holds anything else."""
    needed = {"epoch", "learning_rate", "train_loss", "train_accuracy"}
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        sound = len(history) > 0 and all(
            needed <= entry.keys() and all(math.isfinite(value) for value in entry.values()) for entry in history
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged or not a history of train.py; delete it or train again")
    return history


@contextmanager
def recording(*modules: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Collect the outputs of `modules`, one for each forward pass within the context; the hooks go with it."""
    outputs: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    hooks = [m.register_forward_hook(lambda module, _, output: outputs[module].append(output)) for m in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def grad_cam(model: Net, x: Tensor, classes: Tensor) -> Tensor:
    """Where the last 3x3 convolution finds what speaks for `classes` (N,) in `x` (N, 1, 28, 28): (N, 28, 28), >= 0.

    Grad-CAM (Selvaraju et al., 2017): its feature maps after the activation, where zero means "not there", weighted
    by the mean gradient of the class's logit over each map, summed, rectified and interpolated to the input's size.
    """
    layer = [block for block in model.blocks if block.conv.kernel_size == (3, 3)][-1].act
    with recording(layer) as outputs:
        logits = model(x)
    maps = outputs[layer][0]
    (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps)
    cam = F.relu((gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
    return F.interpolate(cam.detach(), x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)


def smooth_grad(model: Net, x: Tensor, classes: Tensor, samples: int = 100, noise: float = 0.2) -> Tensor:
    """How strongly each pixel of `x` (N, 1, 28, 28) moves the logits of `classes` (N,): (N, 28, 28), >= 0.

    SmoothGrad (Smilkov et al., 2017): the gradient averaged over `samples` copies with Gaussian noise of
    standard deviation `noise` times the image's range, then its absolute value.
    """
    generator = torch.Generator().manual_seed(0)
    saliency = []
    for image, digit in zip(x, classes):
        normal = torch.randn(samples, *image.shape, generator=generator).to(x.device)
        noisy = (image + noise * (image.max() - image.min()) * normal).requires_grad_()
        (gradients,) = torch.autograd.grad(model(noisy)[:, digit].sum(), noisy)
        saliency.append(gradients.mean(0).abs().squeeze(0))
    return torch.stack(saliency)


def pca(features: Tensor, components: int = 2) -> tuple[Tensor, Tensor]:
    """Principal components of `features` (N, D): coordinates (N, components), and their shares of the variance."""
    centred = (features - features.mean(0)).double()
    _, s, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:components]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))  # an axis and its negative are equally good: choose
    return centred @ (axes * largest.sign()).t(), s[:components] ** 2 / (s**2).sum()


def chart(size: tuple[float, float], title: str, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of `size` inches with `columns` axes side by side, under a title."""
    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, x=0.1 / size[0], ha="left", color=INK)
    return figure, axes


def sheet(
    title: str, note: str, rows: int, widths: Sequence[float], height: float, gap: tuple[float, float],
    left: float = 0.25,
) -> tuple[Figure, np.ndarray]:  # fmt: skip
    """Blank panels (rows, len(widths)), sized in inches, `gap` (across, down) apart, under a title and a grey note.

    No layout engine: with hundreds of panels it would take minutes.
    """
    header, margin, panels = 0.9, 0.25, sum(widths) + (len(widths) - 1) * gap[0]
    w, h = max(left + panels + margin, 7.5), header + rows * (height + gap[1]) - gap[1] + margin
    figure = plt.figure(figsize=(w, h))
    figure.suptitle(title, x=margin / w, y=1 - 0.18 / h, ha="left", va="top", color=INK)
    figure.text(margin / w, 1 - 0.43 / h, note, ha="left", va="top", color=MUTED)
    axes = figure.subplots(
        rows, len(widths), squeeze=False, width_ratios=widths,
        gridspec_kw={
            "left": left / w, "right": (left + panels) / w, "wspace": gap[0] / np.mean(widths),
            "top": 1 - header / h, "bottom": margin / h, "hspace": gap[1] / height,
        },
    )  # fmt: skip
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


def side_label(axis: Axes, text: str) -> None:
    """Words to the left of a panel."""
    axis.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=6)


def plot_errors(reading: Reading, limit: int) -> Figure:
    """The misread digits, `limit` at most, each with label, prediction and confidence."""
    mistakes = reading.mistakes()
    shown = mistakes[:limit].tolist()
    order = ", most confident mistake first" if len(mistakes) <= limit else f"; the {limit} most confident mistakes"
    columns = min(10, max(1, len(shown)))
    figure, axes = sheet(
        reading.summary() + (order if shown else ""),
        "Above each digit: true label → prediction, and the confidence in the prediction" if shown else "",
        rows=max(1, math.ceil(len(shown) / columns)), widths=[0.95] * columns, height=0.95, gap=(0.14, 0.3),
    )  # fmt: skip
    for axis, i in zip(axes.flat, shown):
        show_image(axis, reading.split.images[i, 0])
        caption(axis, f"{reading.split.labels[i]} → {reading.predicted[i]}", f"{reading.confidence[i]:.1%}")
    return figure


def plot_confusion(reading: Reading) -> Figure:
    """The confusion matrix; colour is for the mistakes alone, which the diagonal would drown."""
    counts = utils.confusion_matrix(reading.predicted, reading.split.labels)
    wrong = counts - counts.diag().diag()
    (true, read_as), most = divmod(int(wrong.argmax()), 10), int(wrong.max())
    worst = f", most often {true} as {read_as} ({most} time{'s' * (most > 1)})" if most else ""

    figure, axis = chart((6.9, 7.2), reading.summary() + worst)
    axis.imshow(np.ma.masked_equal(wrong.numpy(), 0), cmap="Blues", vmin=0, vmax=max(most, 1))
    for row, column in np.ndindex(10, 10):
        count = int(counts[row, column])
        if row == column:
            axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color="0.9", linewidth=0))
            axis.text(column, row, f"{count:,}", ha="center", va="center", color=MUTED)
        elif count:
            color = "white" if count > 0.6 * most else INK  # on dark and on light blue
            axis.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontweight="bold")
    axis.set(xticks=range(10), yticks=range(10), xlabel="prediction", ylabel="true digit")
    axis.hlines(np.arange(-0.5, 10), -0.5, 9.5, color="0.85", linewidth=0.6)
    axis.vlines(np.arange(-0.5, 10), -0.5, 9.5, color="0.85", linewidth=0.6)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    return figure


def plot_history(history: list[dict[str, float]]) -> Figure:
    """Learning rate, loss and accuracy by epoch; loss and errors shrink by orders of magnitude, hence logarithms."""
    first, last = history[0], history[-1]
    keys = set.intersection(*(set(entry) for entry in history))
    kind, prefix = ("Validation", "val") if {"val_loss", "val_accuracy"} <= keys else ("Training", "train")
    final = f"accuracy {last[f'{prefix}_accuracy']:.2f}% and loss {last[f'{prefix}_loss']:.4f}"
    epochs = f"{last['epoch']:,} epoch{'s' * (last['epoch'] != 1)}"
    figure, axes = chart((10, 3.4), f"{kind} {final} after {epochs}", columns=3)
    axes[1].set_yscale("log")
    to_axis, from_axis = lambda y: -np.log(np.maximum(100.01 - y, 1e-9)), lambda t: 100.01 - np.exp(-t)
    axes[2].set_yscale("function", functions=(to_axis, from_axis))

    curves = (("training (augmented, dropout)", "o-", INK), ("validation", "s--", ACCENT))
    panels = {
        "learning rate at the epoch's start": ["learning_rate"],
        "cross-entropy loss": ["train_loss", "val_loss"],
        "accuracy (%)": ["train_accuracy", "val_accuracy"],
    }
    for axis, (label, names) in zip(axes, panels.items()):
        for name, (curve, style, color) in zip(names, curves):
            if name in keys:
                points = [(entry["epoch"], entry[name]) for entry in history]
                axis.plot(*zip(*points), style, color=color, label=curve, markersize=3, linewidth=1.3)
        axis.set(xlabel="epoch", ylabel=label, xlim=(first["epoch"] - 0.5, last["epoch"] + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.grid(axis="y", color="0.92")
    axes[0].set_ylim(bottom=0)
    axes[1].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    axes[2].yaxis.set(major_locator=FixedLocator(ACCURACY_TICKS), major_formatter="{x:g}")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="upper right", ncols=2)
    return figure


def plot_explanations(model: Net, reading: Reading, device: torch.device) -> Figure:
    """Grad-CAM and SmoothGrad of the most confident mistakes, for the true and for the predicted digit."""
    mistakes = reading.mistakes()
    shown, half = mistakes[:EXPLAINED], [1.05] * 5
    figure, axes = sheet(
        f"What speaks for the true and for the predicted digit: {len(shown)} of {len(mistakes):,} mistakes, "
        "most confident first" if len(shown) else f"{reading.summary()}: nothing to explain",
        "Grad-CAM: what the last 3x3 convolution finds for a digit. SmoothGrad: the pixels that move its score. "
        "Bright is strong, on one scale for both digits",
        rows=max(1, math.ceil(len(shown) / 2)), widths=[*half, 0.1, *half], height=1.05, gap=(0.08, 0.32),
    )  # fmt: skip
    if not len(shown):
        return figure
    images, labels = reading.split.select(shown)
    pairs = torch.stack([labels, reading.predicted[shown]], 1)
    x = utils.normalize(images.float() / 255).to(device)
    methods = {"Grad-CAM": grad_cam, "SmoothGrad": smooth_grad}
    maps = torch.stack([method(model, x, digit.to(device)) for method in methods.values() for digit in pairs.t()], 1)
    maps = maps.cpu().unflatten(1, (2, 2))  # (N, methods, true and predicted, 28, 28)
    # One scale for both digits, so that they compare, capped at the 99th percentile as in the SmoothGrad paper.
    maps /= maps.flatten(2).quantile(0.99, 2)[..., None, None, None].clamp(min=1e-12)

    rows = np.delete(axes, 5, axis=1).reshape(-1, 5)  # without the gap in the middle
    for panels, i, image, pair, heats in zip(rows, shown, images[:, 0], pairs.tolist(), maps.flatten(1, 2)):
        show_image(panels[0], image)
        caption(panels[0], f"{pair[0]} → {pair[1]}", f"{reading.confidence[i]:.1%}")
        for axis, heat, name in zip(panels[1:], heats, [f"{method}: {digit}" for method in methods for digit in pair]):
            show_image(axis, heat, 0, 1, "cividis")
            contour = axis.contour(image.numpy(), levels=[100], colors="white", linewidths=0.9)
            contour.set_path_effects([withStroke(linewidth=2, foreground="0.2")])  # seen on dark and on bright ground
            axis.set_title(name, loc="left", color=MUTED)
    return figure


def plot_filters(model: Net, reading: Reading, device: torch.device) -> Figure:
    """The first layer's filters, and the output of each block for the first test digit."""
    image, label = reading.split.images[:1], reading.split.labels[0]
    blocks = list(model.blocks)
    with torch.no_grad(), recording(*blocks) as outputs:
        model(utils.normalize(image.float() / 255).to(device))
    filters = blocks[0].conv.weight.detach()[:, 0].cpu()
    groups = {"filters": filters, **{f"block {i}": outputs[block][0][0].cpu() for i, block in enumerate(blocks, 1)}}
    heights = [math.ceil(min(len(maps), MAPS_SHOWN) / 12) for maps in groups.values()]
    figure, axes = sheet(
        f"The {len(filters)} learned filters of the first layer, and what each block makes of one {label}",
        "Filters: grey is 0, black negative, white positive. Maps: dark is weak, bright is strong, on one scale for "
        "each block",
        rows=1 + sum(heights), widths=[0.72] * 12, height=0.72, gap=(0.08, 0.12), left=1.25,
    )  # fmt: skip
    show_image(axes[0, 0], image[0, 0])
    side_label(axes[0, 0], f"test digit\nread as {reading.predicted[0]}")
    row = 1
    for (name, maps), height in zip(groups.items(), heights):
        bound = float(maps.abs().max())
        scale = (-bound, bound, "gray") if maps is filters else (float(maps.min()), float(maps.max()), "cividis")
        for axis, channel in zip(axes[row : row + height].flat, maps):
            show_image(axis, channel, *scale)
        some = f"\n{MAPS_SHOWN} of {len(maps)}" if len(maps) > MAPS_SHOWN else ""
        side_label(axes[row, 0], f"{name}\n{maps.shape[1]}x{maps.shape[2]}{some}")
        row += height
    return figure


def plot_embedding(model: Net, reading: Reading, split: Split) -> Figure:
    """The features before the last layer in two dimensions, coloured by digit."""
    with recording(model.act) as outputs:
        utils.predict(model, split)
    features = torch.cat(outputs[model.act]).cpu()
    (points, shares), labels, mistakes = pca(features), reading.split.labels, reading.mistakes()

    ringed = f"{len(mistakes):,} of them misread (ringed)" if len(mistakes) else "none of them misread"
    title = f"{len(labels):,} test digits, {ringed}: {features.shape[1]} features in two dimensions"
    figure, axis = chart((8, 7), title)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # no digit lies on top of others
    colors = DIGIT_COLORS[labels.numpy()]
    axis.scatter(*points[order].numpy().T, s=5, c=colors[order.numpy()], linewidths=0, alpha=0.6)
    axis.scatter(*points[mistakes].numpy().T, s=34, c=colors[mistakes.numpy()], edgecolors="black", linewidths=1.1)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    axis.set_ylabel(f"second principal component ({shares[1]:.0%} of the variance)")

    for digit in labels.unique().tolist():
        axis.text(
            *points[labels == digit].median(0).values.tolist(), str(digit), ha="center", va="center", fontsize=11,
            fontweight="bold", color="white", path_effects=[withStroke(linewidth=2, foreground="0.1")],
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": DIGIT_COLORS[digit], "edgecolor": "white"},
        )  # fmt: skip
    return figure


def plot_images(names: list[str], originals: list[Image.Image], digits: Tensor, probabilities: Tensor) -> Figure:
    """Each image as it was, as the network sees it, uint8 (N, 28, 28), and its probabilities (N, 10)."""
    count, across = len(names), min(2, len(names))
    figure, axes = sheet(
        f"What the network reads in {count:,} image{'s' * (count > 1)}",
        "Each image, the 28x28 digit made of it, and the probability of each digit",
        rows=math.ceil(count / across), widths=[1.2, 1.2, 2.2] * across, height=1.2, gap=(0.3, 0.55),
    )  # fmt: skip
    for (left, middle, right), name, original, digit, p in zip(
        axes.reshape(-1, 3), names, originals, digits, probabilities
    ):
        show_image(left, original)
        left.set_title(name, loc="left", color=MUTED, parse_math=False)
        show_image(middle, digit)
        best = int(p.argmax())
        right.set_axis_on()
        right.bar(range(10), p.numpy(), color=[ACCENT if k == best else "0.7" for k in range(10)], width=0.75)
        right.set(xticks=range(10), yticks=[0, 1], ylim=(0, 1), xlim=(-0.6, 9.6))
        right.tick_params(length=0, labelsize=8)
        caption(right, f"reads {best}", f"{p[best]:.1%}")
    return figure


def save(figure: Figure, path: Path, keep: bool) -> None:
    """Write `figure` as PNG, whole or not at all, and print its path and title; close it unless a window shows it."""
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    report(path, figure.get_suptitle())
    if not keep:
        plt.close(figure)


def report(path: Path, text: str) -> None:
    """Print a path and what it shows, in columns."""
    print(f"{path!s:<{len(str(path.with_name('confusion_matrix.png')))}}  {text}", flush=True)


def draw_errors(args: argparse.Namespace, model: Net, metrics: dict[str, Any], device: torch.device, keep: bool) -> int:
    """The pictures of the test set, of the training and, with --explain, of the network's reasons.

    The training's curves are drawn where history.json ends in the checkpoint's own `metrics`.
    """
    history_path = args.checkpoint.with_name("history.json")
    history = read_history(history_path) if history_path.exists() else None
    split = utils.load_mnist(args.data_dir, train=False, device=device)
    reading = read(model, split)

    save(plot_errors(reading, args.max), args.out / "errors.png", keep)
    save(plot_confusion(reading), args.out / "confusion_matrix.png", keep)
    curves = args.out / "training_curves.png"
    if not history:
        report(curves, f"skipped: there is no {history_path}")
    elif history[-1]["train_loss"] != metrics.get("train_loss"):
        report(curves, f"skipped: {history_path} belongs to another training than {args.checkpoint.name}")
    else:
        save(plot_history(history), curves, keep)
    if args.explain:
        save(plot_explanations(model, reading, device), args.out / "explain.png", keep)
        save(plot_filters(model, reading, device), args.out / "filters.png", keep)
        save(plot_embedding(model, reading, split), args.out / "embedding.png", keep)
    return 0


def draw_images(args: argparse.Namespace, model: Net, keep: bool) -> int:
    """The picture of the user's own images; status 1 if one of them cannot be read."""
    paths = find_images(args.images)
    if len(paths) > args.max:
        print(f"Showing the first {args.max} of {len(paths):,} images; --max N shows more")
    names, originals, digits = [], [], []
    for path in paths[: args.max]:
        try:
            original, digit = read_digit(path)
        except UserError as error:
            utils.warn(str(error))
            continue
        name = path.name.encode("utf-8", "replace").decode()  # as bytes that are not UTF-8 cannot be drawn
        names.append(name if len(name) <= 30 else f"…{name[-29:]}")
        originals.append(ImageOps.pad(original, (400, 400), color="white"))
        digits.append(digit)
    if digits:
        prepared = torch.stack(digits)
        probabilities = classify(model, prepared)
        save(plot_images(names, originals, prepared, probabilities), args.out / "images.png", keep)
    return 0 if len(digits) == len(paths[: args.max]) else 1


def can_open_windows() -> bool:
    """Whether matplotlib finds a display and a toolkit for it."""
    try:
        plt.switch_backend(matplotlib.get_backend())
    except ImportError:
        return False
    return matplotlib.get_backend().lower() != "agg"


def main() -> int:
    args = parse_args()
    device = utils.choose_device(args.device)
    windows = args.show and can_open_windows()
    if args.show and not windows:
        utils.warn("--show: no window can be opened here; the files are written all the same")
    if not windows:
        matplotlib.use("Agg")
    model, checkpoint = utils.load_model(args.checkpoint, device)
    with plt.style.context(["default", STYLE]):
        if args.images:
            status = draw_images(args, model, windows)
        else:
            status = draw_errors(args, model, checkpoint["metrics"], device, windows)
        if windows:
            plt.show()
    return status


if __name__ == "__main__":
    utils.run_script(main)
