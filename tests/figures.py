"""README's two figures that no script draws: `python tests/figures.py variants` and `python tests/figures.py accuracy`.

The second trains for hours, into checkpoints/accuracy, and says first how many; what it finds there it does not repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from matplotlib.ticker import FixedLocator, NullLocator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import benchmark  # noqa: E402

import train  # noqa: E402
import utils  # noqa: E402
from visualize_errors import ACCENT, INK, MUTED, STYLE, chart, save, sheet, show_image  # noqa: E402

CPU = torch.device("cpu")
RUNS = ROOT / "checkpoints" / "accuracy"
EPOCHS = (1, 2, 3, 5, 8, 12, 20)
SEEDS = 5
PLAIN_SEEDS = 3
COLUMNS = 12


class PlainWay(NamedTuple):
    """A network and its recipe in everybody's code: its epochs are as many as the learning rates."""

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


# The specification's recipe, taken literally: its logged rates, dropout throughout, last weights.
SPECIFICATION = PlainWay(
    "the specification's recipe, the plain way", benchmark.plain_network, benchmark.AFFINE, benchmark.plain_optimizer,
    np.interp(np.arange(1, 21), [1, 5, 10, 15], [0.005, 0.0035, 0.0015, 0.00075]),
)  # fmt: skip
EXAMPLES = PlainWay(
    "pytorch/examples, mnist", examples_network, nn.Identity(),
    lambda model: torch.optim.Adadelta(model.parameters(), 1.0), 0.7 ** np.arange(14),
)  # fmt: skip


def draw_variants(path: Path) -> None:
    """Zeros, ones, sevens and nines of MNIST, and the same with what `utils.draw_variants` adds."""
    digits = utils.load_mnist(ROOT / "data", train=True, device=CPU)
    variants, shares = utils.draw_variants(digits, factor=1.0, seed=0)
    figure, axes = sheet(
        "Zeros with a slash, ones with a flag, sevens with a bar, nines with a tail",
        "MNIST's training images, and the same with what much of the world adds to them",
        rows=8, columns=COLUMNS, panel=0.8, gap=(0.08, 0.26),
    )  # fmt: skip
    for digit, (before, after) in zip(utils.SHARES, axes.reshape(4, 2, COLUMNS)):
        chosen = ((shares > 0) & (digits.labels == digit)).nonzero().squeeze(1)[:COLUMNS]
        for row, images, label in ((before, digits.images, "MNIST"), (after, variants, "drawn")):
            for axis, image in zip(row, images[chosen, 0]):
                show_image(axis, image)
            row[0].set_title(label, loc="left", color=MUTED)
    save(figure, path)


def train_py(epochs: int) -> list[tuple[float, float]]:
    """(seconds of training, test accuracy in percent) of `train.py --epochs` with each of the seeds 0 to 4."""
    out = RUNS / f"epochs-{epochs}"
    command = [sys.executable, "train.py", "--runs", SEEDS, "--epochs", epochs, "--out", out, "--resume"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    checkpoints = [utils.load_checkpoint(out / f"seed-{seed}" / "model.pt") for seed in range(SEEDS)]
    seconds = [sum(entry["seconds"] for entry in checkpoint["history"]) for checkpoint in checkpoints]
    return list(zip(seconds, (checkpoint["metrics"]["test_accuracy"] for checkpoint in checkpoints)))


def train_the_plain_way(way: PlainWay, seed: int) -> tuple[float, float]:
    """(seconds of training, test accuracy in percent) of `way`, last weights."""
    path = plain_file(way, seed)
    if not path.exists():
        torch.manual_seed(seed)
        loader, model = benchmark.plain_loader(0, way.augment), way.network()
        optimizer, began = way.optimizer(model), time.perf_counter()
        for rate in tqdm(way.rates, f"{way.name}, seed {seed}", unit="epoch", disable=None):
            optimizer.param_groups[0]["lr"] = rate
            benchmark.plain_epoch(model.train(), optimizer, loader)
        seconds = time.perf_counter() - began
        test = utils.load_mnist(ROOT / "data", train=False, device=CPU)
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model((images / 255 - 0.1307) / 0.3081) for images in test.images.split(500)])
        utils.write_json(path, [seconds, utils.accuracy(logits, test.labels)])
    return tuple(json.loads(path.read_text()))


def plain_file(way: PlainWay, seed: int) -> Path:
    """Where the result of `way` is kept."""
    return RUNS / f"{way.rates.size}-epochs-of-{way.network.__name__}-{seed}.json"


def announce() -> None:
    """One line on how long what is missing takes here, from a few steps of each way."""
    work, images = benchmark.train_py()
    began = time.perf_counter()
    work()
    missing = sum(n * (not (RUNS / f"epochs-{n}/seed-{k}/model.pt").exists()) for n in EPOCHS for k in range(SEEDS))
    seconds = missing * 60_000 / images * (time.perf_counter() - began) / train.available_cores()
    for way in (SPECIFICATION, EXAMPLES):
        model, batches = way.network(), islice(benchmark.plain_loader(0, way.augment), 20)
        optimizer, began = way.optimizer(model), time.perf_counter()
        benchmark.plain_epoch(model, optimizer, batches)
        missing = way.rates.size * sum(not plain_file(way, seed).exists() for seed in range(PLAIN_SEEDS))
        seconds += missing * 60_000 / (20 * 64) * (time.perf_counter() - began)
    print(f"About {seconds / 3600:.1f} hours of training", flush=True)


def draw_accuracy(path: Path) -> None:
    """What time buys: mean test accuracy over seconds of training, with a table on standard output."""
    torch.set_num_threads(1)
    announce()
    rows = {f"`train.py --epochs {n}`": train_py(n) for n in EPOCHS}
    for way in (SPECIFICATION, EXAMPLES):
        rows[way.name] = [train_the_plain_way(way, seed) for seed in range(PLAIN_SEEDS)]

    print("\n| training | seconds | test accuracy | std | min | runs |\n|---|---:|---:|---:|---:|---:|")
    points = []
    for name, results in rows.items():
        seconds = statistics.fmean(duration for duration, _ in results)
        found = train.summary([accuracy for _, accuracy in results])
        print("| {} | {:.0f} | {mean:.2f} % | {std:.2f} | {min:.2f} % | {n} |".format(name, seconds, **found))
        points.append((seconds, found["mean"], found["std"]))

    *ours, specification, examples = points
    x, y, std = np.array(ours).T
    figure, axis = chart((7.5, 4.2), f"{y[-1]:.2f}% after {x[-1] / 60:.0f} minutes: accuracy over time, one CPU core")
    axis.fill_between(x, y - std, y + std, color=ACCENT, alpha=0.15, linewidth=0)
    axis.plot(x, y, "o-", color=ACCENT, markersize=4)
    for epochs, *point in zip(EPOCHS, x, y):
        axis.annotate(f"{epochs}", point, (0, 7), textcoords="offset points", ha="center", color=INK)
    axis.annotate("epochs of train.py: mean and\nstandard deviation of five seeds", (x[3], y[3]), (4, -36),
                  textcoords="offset points", color=ACCENT)  # fmt: skip
    for plain, text in (
        (specification, "the specification's recipe,\nthe plain way, 20 epochs"),
        (examples, "pytorch/examples, mnist:\n1.2 million parameters, 14 epochs"),
    ):
        axis.errorbar(*plain, fmt="s", color=INK, markersize=5, capsize=3)
        axis.annotate(text, plain[:2], (-10, 0), va="center", textcoords="offset points", ha="right", color=INK)
    axis.axhline(99.42, color="0.7", linewidth=0.8, linestyle="--", zorder=0)
    axis.annotate("the specification's 99.42%", (x[0], 99.42), (0, 3), textcoords="offset points", color=MUTED)
    axis.set_xscale("log")
    axis.xaxis.set(major_locator=FixedLocator([10, 30, 60, 120, 300, 600, 1200]), minor_locator=NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="seconds of training", ylabel="test accuracy (%)")
    axis.grid(axis="y", color="0.92")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=("variants", "accuracy"))
    figure = parser.parse_args().figure
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)
    {"variants": draw_variants, "accuracy": draw_accuracy}[figure](ROOT / "assets" / f"{figure}.png")


if __name__ == "__main__":
    utils.run_script(main)
