"""Pictures of the READMEs: `python extras/figures.py NAME`, of variants, accuracy and size.

For the last two it trains for hours into checkpoints/, and uses what is already there.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torchvision import transforms
from torchvision.utils import make_grid
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils
from extras import benchmark
from extras.variants import PROBABILITY, draw_variants

CPU = torch.device("cpu")
RUNS = ROOT / "checkpoints"
EPOCHS = (1, 2, 5, 10, 20)  # of `accuracy`
SEEDS = 10  # of train.py
PLAIN_SEEDS = 3  # of each plain way
SIZES = {100: 3000, 1000: 400, 10_000: 60, 60_000: 20}  # images and epochs of `size`
SIZE_SEEDS = 5

HEAD = "one look | std | min | nine looks | std | min | runs |\n|---" + 8 * "|---:" + "|"
COLORS = {"one look": "#0072b2", "nine looks": "#d55e00"}
STYLE = {
    "font.size": 9, "figure.titlesize": 11, "figure.titleweight": "bold", "savefig.dpi": 150,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.edgecolor": "0.6", "xtick.color": "0.4", "ytick.color": "0.4", "grid.color": "0.92",
}


def plot_variants() -> Figure:
    """Zeros, ones, sevens and nines of MNIST, and the same with what extras/variants.py draws."""
    digits = utils.load_mnist(ROOT / "data", train=True, device=CPU)
    drawn, probability = draw_variants(digits, seed=0)
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    figure.suptitle("Slashes through zeros, flags on ones (some with a base), bars through "
                    "sevens, tails under nines", x=0.01, ha="left")
    for axis, digit in zip(figure.subplots(len(PROBABILITY)), PROBABILITY):
        chosen = ((digits.labels == digit) & (probability > 0)).nonzero().squeeze(1)[:12]
        pairs = torch.cat([digits.images[chosen], drawn[chosen]])
        axis.imshow(make_grid(pairs, nrow=12, padding=1, pad_value=50)[0], cmap="Greys")
        axis.set(xticks=[], yticks=[15, 44], yticklabels=["MNIST", "drawn"])
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    return figure


def train(out: Path, runs: int, *flags: object) -> tuple[float, np.ndarray]:
    """Seconds of the fastest epoch of train.py, and test accuracies in percent (runs, 2).

    Each run has two, with one look and with nine. Trains those that are not in `out`.
    """
    fixed = ("--runs", runs, "--out", out, "--resume", "--data-dir", "data")
    command = [sys.executable, "train.py", *map(str, fixed + flags)]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise utils.UserError(f"train.py failed; if {out} is of another recipe, delete it")
    found = [utils.load_checkpoint(run) for run in utils.find_runs(out)]
    metrics = [run["metrics"] for run in found]
    accuracies = [[100 * m["test_accuracy"], 100 * m["test_tta_accuracy"]] for m in metrics]
    return min(e["seconds"] for run in found for e in run["history"]), np.array(accuracies)


def print_row(name: str, seconds: float, accuracies: np.ndarray) -> None:
    """Print accuracies in percent (runs, looks), of one look and perhaps of nine."""
    cells = [name, f"{seconds:.0f}"]
    for look in accuracies.T:
        cells += [f"{look.mean():.2f} %", f"{look.std(ddof=1):.2f}", f"{look.min():.2f} %"]
    cells += ["–"] * (8 - len(cells))
    print(f"| {' | '.join(cells)} | {len(accuracies)} |")


def chart(title: str, x: list[float], accuracies: list[np.ndarray], ticks: list[int]) -> Axes:
    """Curves of accuracies in percent (points, runs, 2) over `x` (points,)."""
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    figure.suptitle(title, x=0.013, ha="left")
    axis = figure.subplots()
    for i, (look, color) in enumerate(COLORS.items()):
        found = np.array(accuracies)[:, :, i]
        mean = found.mean(1)
        std = found.std(1, ddof=1)
        label = f"train.py, {look}: mean ± std of {found.shape[1]} seeds"
        axis.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axis.plot(x, mean, "o-", color=color, markersize=4, label=label)
    axis.grid(axis="y")
    axis.set(xscale="log", ylabel="test accuracy (%)")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    return axis


def examples_network() -> nn.Sequential:
    """The network of pytorch/examples, mnist/main.py: 1.2 million parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.25), nn.Flatten(),
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )


SCALED = transforms.RandomAffine(10, scale=(0.9, 1.1))
# Learning rates at epochs 1, 5, 10, 15 of the specification's log:
RATES = np.interp(range(1, 21), [1, 5, 10, 15], [0.005, 0.0035, 0.0015, 0.00075])
PLAIN_WAYS = {  # network, augmentation, and the rate of each epoch
    "the specification's recipe from 0.005": (benchmark.plain_network, SCALED, RATES),
    "the specification's recipe from 0.015": (benchmark.plain_network, SCALED, 3 * RATES),
    "pytorch-examples, mnist": (examples_network, nn.Identity(), 0.7 ** np.arange(14)),
}


def train_the_plain_way(name: str, seed: int) -> tuple[float, float]:
    """Seconds (epochs times the fastest one), and the test accuracy in percent."""
    path = RUNS / f"accuracy/{name}, seed {seed}.json"
    if not path.exists():
        network, augment, rates = PLAIN_WAYS[name]
        torch.manual_seed(seed)
        loader = benchmark.plain_loader(0, augment)
        model = network()
        if network is examples_network:
            optimizer = torch.optim.Adadelta(model.parameters())
        else:
            optimizer = benchmark.plain_optimizer(model)
        seconds = []
        for rate in tqdm(rates, f"{name}, seed {seed}", unit="epoch", disable=None):
            optimizer.param_groups[0]["lr"] = rate
            start = time.perf_counter()
            benchmark.plain_epoch(model.train(), optimizer, loader)
            seconds.append(time.perf_counter() - start)
        test = utils.load_mnist(ROOT / "data", train=False, device=CPU)
        logits = utils.predict(nn.Sequential(benchmark.NORMALIZE, model), test.images)
        accuracy = 100 * utils.measure(logits, test.labels)["accuracy"]
        utils.write_json(path, [len(rates) * min(seconds), accuracy])
    return tuple(json.loads(path.read_text()))


def plot_accuracy() -> Figure:
    """Test accuracy over seconds of training; prints a table."""
    print(f"| training | seconds | {HEAD}")
    times = []
    accuracies = []
    for epochs in EPOCHS:
        fastest, found = train(RUNS / f"accuracy/epochs-{epochs}", SEEDS, "--epochs", epochs)
        times.append(epochs * fastest)
        accuracies.append(found)
        print_row(f"`train.py --epochs {epochs}`", epochs * fastest, found)
    title = "Test accuracy over the time of training, on one CPU core"
    axis = chart(title, times, accuracies, [15, 30, 60, 120, 300, 600, 1200])
    for epochs, x, found in zip(EPOCHS, times, accuracies):
        axis.text(x, found[:, 1].mean() + 0.015, epochs, ha="center")
    for name, marker in zip(PLAIN_WAYS, "v^s"):
        runs = [train_the_plain_way(name, seed) for seed in range(PLAIN_SEEDS)]
        seconds, accuracy = np.array(runs).T
        print_row(name, seconds.min(), accuracy[:, None])
        std = accuracy.std(ddof=1)
        y = accuracy.mean()
        axis.errorbar(seconds.min(), y, std, fmt=marker, color="0.15", label=name)
    axis.axhline(99.42, color="0.7", linestyle="--", label="the specification's own figure")
    axis.set_xlabel("seconds of training; the numbers are epochs")
    axis.figure.legend(loc="outside lower center", ncols=2)
    return axis.figure


def plot_size() -> Figure:
    """Test accuracy over the number of training images; prints a table."""
    print(f"| images, epochs | seconds | {HEAD}")
    accuracies = []
    for images, epochs in SIZES.items():
        size = images if images < 60_000 else 0  # 0: all
        flags = ("--train-size", size, "--epochs", epochs)
        fastest, found = train(RUNS / f"size/{images}", SIZE_SEEDS, *flags)
        accuracies.append(found)
        print_row(f"{images:,}, {epochs:,}", epochs * fastest, found)
    sizes = list(SIZES)
    axis = chart("Test accuracy over the number of training images", sizes, accuracies, sizes)
    axis.set_xlabel("training images")
    axis.legend(loc="lower right")
    return axis.figure


FIGURES = {"variants": plot_variants, "accuracy": plot_accuracy, "size": plot_size}


def main() -> None:
    parser = utils.Parser(__doc__.splitlines()[0])
    parser.add_argument("name", choices=FIGURES)
    args = parser.parse_args()
    path = ROOT / "assets" / f"{args.name}.png"
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[args.name]()
        with utils.atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")
    print(f"\nWrote {path}")


if __name__ == "__main__":
    utils.run_script(main)
