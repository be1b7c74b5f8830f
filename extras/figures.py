"""Figures of both READMEs: `python extras/figures.py variants`, `... accuracy`, and the table of `... photos DIR`.

`accuracy` trains for hours, into checkpoints/accuracy, and uses what is already there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib.style
import numpy as np
import torch
import torch.nn as nn
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor
from torchvision import transforms
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils
from extras import benchmark, photos, several
from extras.variants import PROBABILITY, draw_variants
from model import load_pretrained
from visualize_errors import ACCENT, INK, MUTED, SECOND, STYLE, chart, save, sheet, show_image

CPU = torch.device("cpu")
RUNS = ROOT / "checkpoints" / "accuracy"
EPOCHS = (1, 2, 5, 10, 20)
SEEDS, PLAIN_SEEDS = 10, 2
COLUMNS = 12
LOGGED = np.interp(np.arange(1, 21), [1, 5, 10, 15], [0.005, 0.0035, 0.0015, 0.00075])  # the specification's rates


class PlainWay(NamedTuple):
    """A network and its recipe in the usual code, with a learning rate for each epoch."""

    name: str
    network: Callable[[], nn.Module]
    augment: Callable
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    rates: np.ndarray


def examples_network() -> nn.Sequential:
    """The network of pytorch/examples, mnist/main.py: 1.2 million parameters."""
    return nn.Sequential(
        *[nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)],
        *[nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)],
    )


def specification(rates: np.ndarray) -> PlainWay:
    """The specification's recipe as it is written: rotation and scaling, constant dropout, the last weights."""
    affine = transforms.RandomAffine(10, scale=(0.9, 1.1))
    name = f"the specification's recipe from {rates[0]:g}"
    return PlainWay(name, benchmark.plain_network, affine, benchmark.plain_optimizer, rates)


PLAIN_WAYS = (
    specification(LOGGED),  # the rates of its log
    specification(3 * LOGGED),  # "Initial Learning Rate: 0.015", falling as the log's
    PlainWay("pytorch/examples, mnist", examples_network, nn.Identity(),
             lambda model: torch.optim.Adadelta(model.parameters(), 1.0), 0.7 ** np.arange(14)),
)  # fmt: skip


def plot_variants(path: Path) -> None:
    """Zeros, ones, sevens and nines of MNIST, and the same with what `extras/variants.py` draws."""
    digits = utils.load_mnist(ROOT / "data", train=True, device=CPU)
    drawn, probability = draw_variants(digits, seed=0)
    figure, axes = sheet(
        "Zeros with a slash, ones with a flag (some with a base), sevens with a bar, nines with a tail",
        "Upper rows: MNIST's training images. Lower rows: the same with a stroke that much of the world adds",
        rows=8, columns=COLUMNS, panel=0.8, gap=(0.08, 0.26),
    )  # fmt: skip
    added = (drawn.float() - digits.images.float()).clamp(min=0).sum((1, 2, 3)) / digits.images.float().sum((1, 2, 3))
    for digit, (before, after) in zip(PROBABILITY, axes.reshape(4, 2, COLUMNS)):
        visible = (probability > 0) & (digits.labels == digit) & (added > 0.4)
        chosen = visible.nonzero().squeeze(1)[:COLUMNS]
        for row, images, label in ((before, digits.images, "MNIST"), (after, drawn, "drawn")):
            for axis, image in zip(row, images[chosen, 0]):
                show_image(axis, image)
            row[0].set_title(label, loc="left", color=MUTED)
    save(figure, path)


def train_py(epochs: int) -> list[tuple[float, float, float]]:
    """(seconds, test accuracy, the same with nine looks) of `train.py --epochs` with seeds 0 to 9."""
    out = RUNS / f"epochs-{epochs}"
    command = [sys.executable, "train.py", "--runs", SEEDS, "--epochs", epochs, "--out", out, "--resume"]
    if subprocess.run(list(map(str, command)), cwd=ROOT).returncode:
        raise utils.UserError(f"training into {out} failed; if it holds runs of another recipe, delete it")
    checkpoints = [utils.load_checkpoint(out / f"seed-{seed}" / "model.pt") for seed in range(SEEDS)]
    seconds = [epochs * min(entry["seconds"] for entry in checkpoint["history"]) for checkpoint in checkpoints]
    metrics = [checkpoint["metrics"] for checkpoint in checkpoints]
    return [(s, m["test_accuracy"], m["test_tta_accuracy"]) for s, m in zip(seconds, metrics)]


def train_the_plain_way(way: PlainWay, seed: int) -> tuple[float, float]:
    """(seconds, test accuracy) of the last weights of `way`."""
    path = RUNS / f"{way.network.__name__}-from-{way.rates[0]:g}-seed-{seed}.json"
    if not path.exists():
        torch.manual_seed(seed)
        loader, model = benchmark.plain_loader(0, way.augment), way.network()
        optimizer, seconds = way.optimizer(model), []
        for rate in tqdm(way.rates, f"{way.name}, seed {seed}", unit="epoch", disable=None):
            optimizer.param_groups[0]["lr"] = rate
            began = time.perf_counter()
            benchmark.plain_epoch(model.train(), optimizer, loader)
            seconds.append(time.perf_counter() - began)
        test = utils.load_mnist(ROOT / "data", train=False, device=CPU)
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model((images / 255 - 0.1307) / 0.3081) for images in test.images.split(500)])
        utils.write_json(path, [len(seconds) * min(seconds), utils.measure(logits, test.labels)["accuracy"]])
    return tuple(json.loads(path.read_text()))


def plot_accuracy(path: Path) -> None:
    """Mean test accuracy over seconds of training, with a table on standard output.

    The seconds are those of the fastest epoch of all seeds, times the epochs: hours of training are never undisturbed.
    """
    print("\n| training | seconds | one look | std | min | nine looks | std | min | runs |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    points = []
    rows = {f"`train.py --epochs {n}`": partial(train_py, n) for n in EPOCHS}
    rows.update({way.name: partial(map, partial(train_the_plain_way, way), range(PLAIN_SEEDS)) for way in PLAIN_WAYS})
    for name, results in rows.items():
        seconds, *looks = zip(*results())
        found = [several.statistics_of([100 * accuracy for accuracy in look]) for look in looks]
        cells = [f"{look['mean']:.2f} % | {look['std']:.2f} | {look['min']:.2f} %" for look in found]
        cells += ["– | – | –"] * (2 - len(found))
        print(f"| {name} | {min(seconds):.0f} | {' | '.join(cells)} | {len(seconds)} |", flush=True)
        points.append((min(seconds), *(value for look in found for value in (look["mean"], look["std"]))))

    ours, plain = np.array(points[: len(EPOCHS)]).T, points[len(EPOCHS) :]
    figure, axis = chart((7.5, 4.4), "Test accuracy over the time of training, on one CPU core")
    for mean, std, color, label in ((ours[1], ours[2], SECOND, "one look"), (ours[3], ours[4], ACCENT, "nine looks")):
        axis.fill_between(ours[0], mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axis.plot(
            ours[0], mean, "o-", color=color, markersize=4, label=f"train.py, {label}: mean ± std of {SEEDS} seeds"
        )
    for epochs, x, y in zip(EPOCHS, ours[0], ours[3]):
        axis.annotate(f"{epochs}", (x, y), (0, 7), textcoords="offset points", ha="center", color=INK)
    for way, (x, y, std) in zip(PLAIN_WAYS, plain):
        axis.errorbar(x, y, std, fmt="s", color=INK, markersize=5, capsize=3)
        text = f"{way.name}, the plain way, {way.rates.size} epochs"
        axis.annotate(text, (x, y), (-10, 0), va="center", textcoords="offset points", ha="right", color=INK)
    axis.axhline(99.42, color="0.7", linewidth=0.8, linestyle="--", zorder=0)
    line = "the specification's 99.42%"
    axis.annotate(line, (plain[-1][0], 99.42), (0, 3), textcoords="offset points", ha="right", color=MUTED)
    axis.set_xscale("log")
    axis.xaxis.set(major_locator=FixedLocator([15, 30, 60, 120, 300, 600, 1200]), minor_locator=NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="seconds of training; the numbers are epochs", ylabel="test accuracy (%)")
    axis.grid(axis="y", color="0.92")
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path)


def usual_recipe(gray: Tensor, is_alone: bool) -> Tensor:
    """The digits in brightness (H, W) as most tutorials cut them out: uint8 (N, 28, 28).

    Otsu's threshold (1979); ink is the rarer side; a box around it, or around each connected part; the middle of the
    box in the middle of the image. It is told whether the digit `is_alone`.
    """
    counts = torch.histc(gray, 256, 0, 1)
    below, sums = counts.cumsum(0), (counts * torch.arange(256)).cumsum(0)
    between = (sums[-1] * below / below[-1] - sums) ** 2 / (below * (below[-1] - below)).clamp(min=1)
    ink = (gray * 255 > between.argmax()).float()
    ink = 1 - ink if ink.mean() > 0.5 else ink
    parts = sorted(photos.find_parts(ink, 0.5), key=lambda part: part.left)
    masks = [ink > 0.5] if is_alone else [photos.mask_of([part], ink) for part in parts]
    digits = [photos.fit_within(photos.crop(ink, mask), photos.DIGIT_SIZE) for mask in masks]
    return (255 * torch.stack([transforms.functional.center_crop(digit, [28, 28]) for digit in digits])).byte()


def print_photos(folder: Path) -> None:
    """How many images in `folder`/KIND/NUMBER/ are read right, here and by the usual recipe, as a table."""
    model = load_pretrained()
    print("| kind | digits | the usual recipe | numbers | the usual recipe |\n|---|---:|---:|---:|---:|")
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        right = np.zeros((2, 3), int)  # rows: digits, numbers; columns: read here, by the usual recipe, in all
        files = photos.find_images([kind])
        read = {report["path"]: report["number"] for _, _, report in photos.read_files(model, files)}
        for path in files:
            label, image = path.parent.name, photos.open_image(path).convert("L")
            digits = usual_recipe(torch.from_numpy(np.asarray(image, np.float32) / 255), len(label) == 1)
            usual = photos.digits_to_text(photos.classify(model, digits).argmax(1))
            right[int(len(label) > 1)] += read.get(str(path)) == label, usual == label, 1
        cells = [f"{ours} of {count} | {usual}" if count else "– | –" for ours, usual, count in right]
        print(f"| {kind.name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=("variants", "accuracy", "photos"))
    parser.add_argument("folder", type=Path, nargs="?", default="photos", help="of DIR/KIND/NUMBER/IMAGE, all readable")
    args = parser.parse_args()
    if args.figure == "photos":
        return print_photos(args.folder)
    with matplotlib.style.context(["default", STYLE]):
        plot = plot_variants if args.figure == "variants" else plot_accuracy
        plot(ROOT / "assets" / f"{args.figure}.png")


if __name__ == "__main__":
    utils.run_script(main)
