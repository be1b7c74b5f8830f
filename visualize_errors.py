"""Pictures of what the network misreads, how it learned and why it errs: `python visualize_errors.py --help`."""

from __future__ import annotations

import argparse
import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import matplotlib
import matplotlib.patheffects as patheffects
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

import utils
from utils import Split, UserError, in_range

EXPLAINED = 8  # mistakes in explain.png
MAPS_SHOWN = 24  # feature maps of a block in filters.png; wider networks have more
DPI = 150
STYLE = {
    "font.size": 9, "axes.titlesize": 8.5, "axes.titlepad": 3, "figure.titlesize": 11, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6", "axes.labelcolor": "0.25",
    "xtick.color": "0.4", "ytick.color": "0.4", "image.cmap": "Greys", "legend.frameon": False, "savefig.dpi": DPI,
}  # fmt: skip
INK, ACCENT, MUTED = "0.15", "#d55e00", "0.45"
# Ten colours that colour-blind readers can tell apart (Petroff, "Accessible Color Sequences", 2021).
DIGIT_COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581",
                "#92dadd")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw the test digits that the network misreads, and why.")
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("checkpoints/model.pt"), metavar="PATH", help="(default: %(default)s)")
    utils.add_common_flags(parser)
    add("--out", type=Path, default=Path("plots"), metavar="DIR", help="(default: %(default)s)")
    add("--max", type=in_range(int, 1, 500), default=50, metavar="N",
        help="mistakes or images to show at most (default: %(default)s)")  # fmt: skip
    add("--explain", action="store_true", help="also draw explain.png, filters.png and embedding.png")
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="draw images.png only: what the network reads in these files or folders of images")  # fmt: skip
    add("--show", action="store_true", help="also open windows")
    args = parser.parse_args(argv)
    if args.images and args.explain:
        parser.error("--images goes without --explain")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


class Reading(NamedTuple):
    """What the network reads in `split`: probabilities (N, 10), prediction and its confidence (N,), on the CPU."""

    split: Split
    probabilities: Tensor
    predicted: Tensor
    confidence: Tensor

    def mistakes(self) -> Tensor:
        """Indices of the misread digits, most confident mistake first."""
        wrong = (self.predicted != self.split.labels).nonzero().squeeze(1)
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)]

    def score(self) -> str:
        """How many are misread, in words."""
        wrong, total = len(self.mistakes()), len(self.predicted)
        return f"{wrong:,} of {total:,} test digits misread" if wrong else f"None of {total:,} test digits misread"


def read(model: nn.Module, split: Split) -> Reading:
    """Run `model` over `split`."""
    probabilities = utils.predict(model, split).softmax(1).cpu()
    confidence, predicted = probabilities.max(1)
    return Reading(Split(*(tensor.cpu() for tensor in split)), probabilities, predicted, confidence)


def read_history(path: Path) -> list[dict[str, float]]:
    """The entries that train.py wrote, one an epoch; UserError if the file holds anything else."""
    required, optional = {"epoch", "learning_rate", "train_loss", "train_accuracy"}, {"val_loss", "val_accuracy"}

    def sound(entry: Any) -> bool:
        return isinstance(entry, dict) and required <= entry.keys() and all(
            type(entry[key]) in (int, float) and math.isfinite(entry[key]) for key in (required | optional) & entry.keys()
        )  # fmt: skip

    try:
        history = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not JSON; delete it or train again") from error
    if not isinstance(history, list) or not history or not all(sound(entry) for entry in history):
        raise UserError(f"{path} is not a history of train.py; delete it or train again")
    return history


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Collect the outputs of `modules`, one for each forward pass within the context; the hooks go with it."""
    outputs: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    hooks = [m.register_forward_hook(lambda module, _, output: outputs[module].append(output)) for m in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def last_spatial_conv(model: nn.Module) -> nn.Conv2d:
    """The last 3x3 convolution of `model`."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][-1]


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Where the last 3x3 convolution finds what speaks for `classes` (N,) in `x` (N, 1, 28, 28): (N, 28, 28), >= 0.

    Grad-CAM (Selvaraju et al., 2017): the feature maps, weighted by the mean gradient of the class's
    logit over each map, summed, rectified and interpolated to the input's size.
    """
    conv = last_spatial_conv(model)
    with recording([conv]) as outputs:
        logits = model(x)
    maps = outputs[conv][0]
    (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps)
    cam = F.relu((gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
    return F.interpolate(cam.detach(), x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)


def smooth_grad(model: nn.Module, x: Tensor, classes: Tensor, samples: int = 50, noise: float = 0.15) -> Tensor:
    """How strongly each pixel of `x` (N, 1, 28, 28) moves the logits of `classes` (N,): (N, 28, 28), >= 0.

    SmoothGrad (Smilkov et al., 2017): the gradient averaged over `samples` copies with Gaussian noise of
    standard deviation `noise` times the image's range, then its absolute value.
    """
    sigma = noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros_like(x)
    for _ in range(samples):
        noisy = x + sigma * torch.randn(x.shape, generator=generator).to(x.device)
        noisy.requires_grad_()
        logits = model(noisy)
        total += torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), noisy)[0]
    return (total / samples).abs().squeeze(1)


def pca(features: Tensor, components: int = 2) -> tuple[Tensor, Tensor]:
    """Principal components of `features` (N, D): coordinates (N, components), and their shares of the variance."""
    centred = (features - features.mean(0)).double()
    _, s, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:components]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))  # an axis and its negative are equally good: choose
    return centred @ (axes * largest.sign()).t(), s[:components] ** 2 / (s**2).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Figures. Each one's title is what the script prints beside its path.


def sheet(
    rows: int, columns: int, panel: tuple[float, float], gap: tuple[float, float], title: str, note: str,
    left: float = 0.25, width_ratios: Sequence[float] | None = None,
) -> tuple[Figure, np.ndarray]:  # fmt: skip
    """Blank axes (rows, columns) of `panel` inches, `gap` inches apart and `left` from the left, under a header."""
    header, margin = 0.95, 0.25
    used = columns * panel[0] + (columns - 1) * gap[0]
    width = max(left + used + margin, 7.5)
    height = header + rows * panel[1] + max(0, rows - 1) * gap[1] + margin * (rows > 0)
    figure = plt.figure(figsize=(width, height))
    figure.suptitle(title, x=0.25 / width, y=1 - 0.18 / height, ha="left", va="top", color=INK)
    figure.text(0.25 / width, 1 - 0.44 / height, note, ha="left", va="top", color=MUTED)
    if rows == 0:
        return figure, np.empty((0, columns))
    axes = figure.subplots(
        rows, columns, squeeze=False, width_ratios=width_ratios,
        gridspec_kw={
            "left": left / width, "right": (left + used) / width, "wspace": gap[0] / panel[0],
            "top": 1 - header / height, "bottom": margin / height, "hspace": gap[1] / panel[1],
        },
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def show_image(axis: Axes, image: Any, **options: Any) -> None:
    """Draw `image` in a thin frame without ticks."""
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, color="0.8", linewidth=0.6)
    axis.imshow(image, **options)


def plot_errors(reading: Reading, limit: int) -> Figure:
    """The misread digits, `limit` at most, each with label, prediction and confidence."""
    mistakes = reading.mistakes()
    shown = mistakes[:limit]
    order = "most confident mistake first" if len(shown) == len(mistakes) else f"the {limit} most confident mistakes"
    columns = min(10, max(1, len(shown)))
    figure, axes = sheet(
        math.ceil(len(shown) / columns), columns, panel=(0.95, 0.95), gap=(0.14, 0.3),
        title=reading.score() + (f", {order}" if len(shown) else ""),
        note="Above each digit: true label → prediction, and the confidence in the prediction" if len(shown) else "",
    )  # fmt: skip
    for axis, i in zip(axes.flat, shown.tolist()):
        show_image(axis, reading.split.images[i, 0], vmin=0, vmax=255)
        caption(axis, f"{reading.split.labels[i]} → {reading.predicted[i]}", f"{reading.confidence[i]:.1%}")
    return figure


def caption(axis: Axes, left: str, right: str = "") -> None:
    """One line above a panel: what it is in bold, a figure in grey."""
    axis.set_title(left, loc="left", fontweight="bold", color=INK)
    axis.set_title(right, loc="right", color=MUTED)


def plot_confusion(reading: Reading) -> Figure:
    """The confusion matrix; colour is for the mistakes alone, which the diagonal would drown."""
    labels, predicted = reading.split.labels, reading.predicted
    counts = torch.bincount(10 * labels + predicted, minlength=100).view(10, 10)
    wrong = counts - counts.diag().diag()
    true, read_as = divmod(int(wrong.argmax()), 10)
    times = int(wrong.max())
    most = f", most often {true} as {read_as} ({times} time{'s' * (times > 1)})" if times else ""

    figure, axis = plt.subplots(figsize=(7.5, 6.8), layout="constrained")
    figure.suptitle(reading.score() + most, color=INK)
    image = axis.imshow(wrong, cmap="Blues", vmin=0, vmax=max(times, 1))
    for row, column in np.ndindex(10, 10):
        if row == column:
            axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color="0.9", linewidth=0))
            axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=MUTED)
        elif wrong[row, column]:
            color = "white" if wrong[row, column] > 0.6 * times else INK
            axis.text(column, row, f"{wrong[row, column]}", ha="center", va="center", color=color, fontweight="bold")
    axis.set(xticks=range(10), yticks=range(10), xlabel="prediction", ylabel="true digit")
    axis.set_xticks(np.arange(-0.5, 10), minor=True)
    axis.set_yticks(np.arange(-0.5, 10), minor=True)
    axis.grid(which="minor", color="0.85", linewidth=0.6)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    for side, totals in (("top", counts.sum(0)), ("right", counts.sum(1))):
        shares = [f"{hit / total:.1%}" if total else "-" for hit, total in zip(counts.diag().tolist(), totals.tolist())]
        other = axis.secondary_xaxis("top") if side == "top" else axis.secondary_yaxis("right")
        other.set_ticks(range(10), shares, fontsize=8)
        other.tick_params(length=0)
        other.spines[:].set_visible(False)
        (other.set_xlabel if side == "top" else other.set_ylabel)("precision" if side == "top" else "recall")
    bar = figure.colorbar(image, ax=axis, shrink=0.5, aspect=25, label="digits misread")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.outline.set_visible(False)
    return figure


def plot_history(history: list[dict[str, float]]) -> Figure:
    """Learning rate, loss and accuracy by epoch."""
    last = history[-1]
    held_out = "val_loss" in last and "val_accuracy" in last
    name, loss, accuracy = ("Validation", "val_loss", "val_accuracy") if held_out else (
        "Training", "train_loss", "train_accuracy")  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained")
    figure.suptitle(
        f"{name} accuracy {last[accuracy]:.2f}% and loss {last[loss]:.4f} after "
        f"{last['epoch']:,.0f} epoch{'s' * (last['epoch'] != 1)}",
        color=INK,
    )
    curves = {
        "learning rate, at the epoch's start": {"": "learning_rate"},
        "cross-entropy loss": {"training": "train_loss", "validation": "val_loss"},
        "accuracy (%)": {"training": "train_accuracy", "validation": "val_accuracy"},
    }
    for axis, (label, lines) in zip(axes, curves.items()):
        for (line, key), (color, style) in zip(lines.items(), ((INK, "o-"), (ACCENT, "s--"))):
            points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
            if points:
                axis.plot(*zip(*points), style, color=color, label=line, markersize=3, linewidth=1.3)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(axis="y", color="0.92")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(bottom=0)
    if held_out:
        axes[1].legend()
    axes[2].set_title("training digits are distorted, with dropout", loc="right", color=MUTED, fontsize=8)
    return figure


def plot_explanations(model: nn.Module, reading: Reading, device: torch.device) -> Figure:
    """Grad-CAM and SmoothGrad of the most confident mistakes, for the true and the predicted class."""
    shown = reading.mistakes()[:EXPLAINED]
    if not len(shown):
        return sheet(0, 1, (1, 1), (0, 0), f"{reading.score()}: nothing to explain", "")[0]
    images, labels = reading.split.select(shown)
    classes = torch.stack([labels, reading.predicted[shown]], 1)
    x = utils.normalize(images.float() / 255).to(device)
    maps = torch.stack([
        torch.stack([method(model, x, wanted.to(device)).cpu() for wanted in classes.unbind(1)], 1)
        for method in (grad_cam, smooth_grad)
    ], 1)  # fmt: skip
    maps /= maps.amax((2, 3, 4), keepdim=True).clamp(min=1e-12)  # one scale for both classes, so that they compare

    figure, axes = sheet(
        math.ceil(len(shown) / 2), 10 if len(shown) > 1 else 5, panel=(1.0, 1.0), gap=(0.1, 0.32),
        title=f"What speaks for the true and for the predicted digit: {len(shown)} most confident of "
        f"{len(reading.mistakes()):,} mistakes",
        note="Grad-CAM: what the last 3x3 convolution finds for a digit. SmoothGrad: pixels that move its score. "
        "Bright is strong, on one scale for both digits",
    )  # fmt: skip
    for row, i, image, pair, found in zip(axes.reshape(-1, 5), shown.tolist(), images[:, 0], classes.tolist(), maps):
        show_image(row[0], image, vmin=0, vmax=255)
        caption(row[0], f"{pair[0]} → {pair[1]}", f"{reading.confidence[i]:.1%}")
        for axis, heat, method, digit in zip(row[1:], found.flatten(0, 1), ("CAM",) * 2 + ("Grad",) * 2, pair * 2):
            show_image(axis, heat, cmap="cividis", vmin=0, vmax=1)
            outline(axis, image)
            axis.set_title(f"{method} for {digit}", loc="left", color=MUTED)
    return figure


def outline(axis: Axes, image: Tensor) -> None:
    """The digit's contour: white with a dark rim, seen on dark and on bright ground."""
    contour = axis.contour(image, levels=[100], colors="white", linewidths=0.9)
    contour.set_path_effects([patheffects.withStroke(linewidth=2, foreground="0.2")])


def plot_filters(model: nn.Module, reading: Reading, device: torch.device) -> Figure:
    """The first layer's filters, and the output of each block for the first test digit."""
    image, label = reading.split.images[:1], int(reading.split.labels[0])
    blocks = [module for name, module in model.named_children() if name.startswith("block")]
    with torch.no_grad(), recording(blocks) as outputs:
        model(utils.normalize(image.float() / 255).to(device))
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    groups = {"filters": first.weight.detach()[:, 0].cpu()}
    groups.update({f"block {i}": outputs[block][0][0].cpu() for i, block in enumerate(blocks, 1)})

    rows = 1 + sum(math.ceil(len(maps[:MAPS_SHOWN]) / 12) for maps in groups.values())
    figure, axes = sheet(
        rows, 12, panel=(0.72, 0.72), gap=(0.08, 0.12), left=1.25,
        title=f"The {len(first.weight)} learned 3x3 filters, and what each block makes of one {label}",
        note="Filters: grey is 0, black negative, white positive. Maps: dark is weak, bright is strong, on one scale "
        "for each block",
    )  # fmt: skip
    show_image(axes[0, 0], image[0, 0], vmin=0, vmax=255)
    row_label(axes[0, 0], f"test digit\nread as {reading.predicted[0]}")
    row = 1
    for name, maps in groups.items():
        shown, bound = maps[:MAPS_SHOWN], float(maps.abs().max())
        look = {"cmap": "gray", "vmin": -bound, "vmax": bound} if name == "filters" else {
            "cmap": "cividis", "vmin": float(maps.min()), "vmax": float(maps.max())}  # fmt: skip
        for axis, channel in zip(axes[row:].flat, shown):
            show_image(axis, channel, **look)
        rest = f", {len(shown)} of {len(maps)}" if len(shown) < len(maps) else ""
        row_label(axes[row, 0], f"{name}{rest}\n{maps.shape[1]}x{maps.shape[2]}")
        row += math.ceil(len(shown) / 12)
    return figure


def row_label(axis: Axes, text: str) -> None:
    """Words to the left of a row's first panel."""
    axis.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=6)


def plot_embedding(model: nn.Module, reading: Reading, split: Split) -> Figure:
    """The features before the last layer in two dimensions, coloured by digit."""
    with recording([model.act]) as outputs:
        utils.predict(model, split)
    features = torch.cat(outputs[model.act]).cpu()
    (points, shares), labels, mistakes = pca(features), reading.split.labels, reading.mistakes()

    figure, axis = plt.subplots(figsize=(8, 7), layout="constrained")
    figure.suptitle(
        f"{features.shape[1]} features of {len(labels):,} test digits in two dimensions; "
        f"{len(mistakes):,} misread{' (ringed)' * (len(mistakes) > 0)}",
        color=INK,
    )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # no digit lies on top of others
    colors = np.array(DIGIT_COLORS)[labels.numpy()]
    axis.scatter(*points[order].t(), s=5, c=colors[order], linewidths=0, alpha=0.6, rasterized=True)
    axis.scatter(*points[mistakes].t(), s=34, c=colors[mistakes], edgecolors="black", linewidths=1.1)
    for digit in labels.unique().tolist():
        center = points[labels == digit].median(0).values
        axis.text(*center, str(digit), ha="center", va="center", fontsize=20, fontweight="bold", color=INK,
                  path_effects=[patheffects.withStroke(linewidth=4, foreground="white")])  # fmt: skip
    for name, share in zip("xy", shares.tolist()):
        component = "first" if name == "x" else "second"
        axis.set(**{f"{name}label": f"{component} principal component ({share:.0%} of the variance)"})
    return figure


def plot_images(names: list[str], originals: list[Image.Image], digits: Tensor, probabilities: Tensor) -> Figure:
    """Each image as it was, as the network sees it (N, 28, 28), and its ten probabilities (N, 10)."""
    count = len(names)
    across = min(2, count)
    figure, axes = sheet(
        math.ceil(count / across), 3 * across, panel=(1.25, 1.25), gap=(0.2, 0.55), width_ratios=[0.85, 0.85, 1.3] * across,
        title=f"What the network reads in {count:,} image{'s' * (count > 1)}",
        note="Each image, the 28x28 digit made of it, and the network's probability of each digit",
    )  # fmt: skip
    for (left, middle, right), name, original, digit, p in zip(
        axes.reshape(-1, 3), names, originals, digits, probabilities
    ):
        original = original.copy()
        original.thumbnail((400, 400))
        show_image(left, original)
        left.set_title(name, loc="left", color=MUTED, parse_math=False)
        show_image(middle, digit, vmin=0, vmax=255)
        best = int(p.argmax())
        right.set_axis_on()
        right.bar(range(10), p, color=[ACCENT if k == best else "0.7" for k in range(10)], width=0.75)
        right.set(xticks=range(10), yticks=[0, 1], ylim=(0, 1), xlim=(-0.6, 9.6))
        right.set_yticks([0, 1], ["0", "1"])
        right.tick_params(length=0, labelsize=8)
        caption(right, f"reads {best}", f"{p[best]:.1%}")
    return figure


def short_name(path: Path, length: int = 22) -> str:
    """The file's name for a narrow caption: its end, in characters that can be drawn."""
    name = path.name.encode("utf-8", "replace").decode()
    return name if len(name) <= length else "…" + name[1 - length :]


# ---------------------------------------------------------------------------------------------------------------------
# The script


def choose_backend(show: bool) -> bool:
    """Draw without a display unless windows are wanted; says whether they can be opened."""
    if show:
        try:
            plt.switch_backend(matplotlib.get_backend())
        except ImportError:  # a backend that needs a display or a toolkit that is not there
            matplotlib.use("Agg")
        if matplotlib.get_backend().lower() != "agg":
            return True
        utils.warn("--show: no window can be opened here; the files are written all the same")
    matplotlib.use("Agg")
    return False


def save(figure: Figure, path: Path, keep: bool) -> None:
    """Write `figure` as PNG, whole or not at all, print its path and title, and close it unless a window will `keep` it."""
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    report(path, figure.get_suptitle())
    if not keep:
        plt.close(figure)


def report(path: Path, text: str) -> None:
    """One line of output: the path, padded so that the texts of all files line up."""
    print(f"{path!s:<{len(str(path.with_name('training_curves.png')))}}  {text}", flush=True)


def draw_errors(args: argparse.Namespace, device: torch.device, keep: bool) -> int:
    """The pictures of the test set, of the training, and with --explain of the network's reasons."""
    model, _ = utils.load_model(args.checkpoint, device)
    history_path = args.checkpoint.with_name("history.json")
    history = read_history(history_path) if history_path.exists() else None
    split = utils.load_mnist(args.data_dir, train=False, device=device)
    reading = read(model, split)

    save(plot_errors(reading, args.max), args.out / "errors.png", keep)
    save(plot_confusion(reading), args.out / "confusion_matrix.png", keep)
    if history:
        save(plot_history(history), args.out / "training_curves.png", keep)
    else:
        report(args.out / "training_curves.png", f"skipped: there is no {history_path}")
    if args.explain:
        save(plot_explanations(model, reading, device), args.out / "explain.png", keep)
        save(plot_filters(model, reading, device), args.out / "filters.png", keep)
        save(plot_embedding(model, reading, split), args.out / "embedding.png", keep)
    return 0


def draw_images(args: argparse.Namespace, device: torch.device, keep: bool) -> int:
    """The picture of the user's own images; status 1 if one of them cannot be read."""
    model, _ = utils.load_model(args.checkpoint, device)
    paths = utils.find_images(args.images)
    if len(paths) > args.max:
        utils.warn(f"showing the first {args.max} of {len(paths):,} images; --max shows more")
        paths = paths[: args.max]
    names, originals, digits = [], [], []
    for path in paths:
        try:
            original, digit = utils.read_digit(path)
        except UserError as error:
            utils.warn(str(error))
            continue
        names.append(short_name(path))
        originals.append(original)
        digits.append(digit)
    if digits:
        split = Split(torch.stack(digits).unsqueeze(1).to(device), torch.zeros(len(digits), dtype=torch.long))
        probabilities = utils.predict(model, split).softmax(1).cpu()
        save(plot_images(names, originals, torch.stack(digits), probabilities), args.out / "images.png", keep)
    return 0 if len(digits) == len(paths) else 1


def main() -> int:
    args = parse_args()
    device = utils.choose_device(args.device)
    windows = choose_backend(args.show)
    with plt.style.context(["default", STYLE]):
        status = (draw_images if args.images else draw_errors)(args, device, windows)
        if windows:
            plt.show()
    return status


if __name__ == "__main__":
    utils.run_script(main)
