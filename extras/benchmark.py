"""Is training fast? `python extras/benchmark.py` compares train.py with the plain way, in turns."""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils
from extras import several

THREADS = torch.get_num_threads()  # PyTorch's default, before run_script sets 1
IMAGES = 6400  # in each timed pass or epoch
NORMALIZE = transforms.Normalize(0.1307, 0.3081)
AFFINE = transforms.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=10)


def plain_network() -> nn.Sequential:
    """The specification's network as usually written."""

    def block(c_in: int, c_out: int, kernel: int, pool: nn.Module, p: float) -> list[nn.Module]:
        conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        return [conv, nn.BatchNorm2d(c_out), nn.ReLU(), pool, nn.Dropout(p)]

    return nn.Sequential(
        *block(1, 12, 3, nn.MaxPool2d(2), 0.1),
        *block(12, 24, 3, nn.MaxPool2d(2), 0.2),
        *block(24, 24, 3, nn.Identity(), 0.3),
        *block(24, 12, 1, nn.Identity(), 0.4),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(108, 72), nn.ReLU(),
        nn.Dropout(0.4), nn.Linear(72, 10),
    )


def plain_loader(workers: int, augment: nn.Module = AFFINE) -> DataLoader:
    """torchvision's MNIST in batches of 64: PIL images, transformed one by one."""
    transform = transforms.Compose([augment, transforms.ToTensor(), NORMALIZE])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "data", folder, dirs_exist_ok=True)
        digits = datasets.MNIST(folder, transform=transform, download=True)  # into memory
    return DataLoader(digits, batch_size=64, shuffle=True, num_workers=workers)


def plain_optimizer(model: nn.Module) -> torch.optim.SGD:
    """The specification's, as usually written."""
    return torch.optim.SGD(model.parameters(), 0.015, 0.9, nesterov=True, weight_decay=1e-4)


def plain_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> None:
    """The steps of one epoch, with `loss.item()` in each."""
    total_loss = 0.0
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total_loss += loss.item()


def plain_way(workers: int, threads: int) -> float:
    """Images per second of the usual training loop."""
    torch.set_num_threads(threads)
    batches = iter(plain_loader(workers))
    model = plain_network()
    optimizer = plain_optimizer(model)
    plain_epoch(model, optimizer, islice(batches, 16))  # warm-up
    start = time.perf_counter()
    plain_epoch(model, optimizer, islice(batches, IMAGES // 64))
    return IMAGES / (time.perf_counter() - start)


def train_py(*flags: str) -> float:
    """Images per second of train.py, or of two processes of it; the first epoch warms up."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = f"--data-dir data --device cpu --train-size {IMAGES} --epochs 4 --out {folder}"
        command = [sys.executable, "train.py", *fixed.split(), *flags]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        runs = utils.find_runs(Path(folder))
        histories = [utils.load_checkpoint(path)["history"] for path in runs]
    times = [statistics.mean(entry["seconds"] for entry in history[1:]) for history in histories]
    return sum(IMAGES / seconds for seconds in times)


PLAIN = f"plain way: 2 workers, {THREADS} threads"
FASTEST = "plain way: 1 worker, 1 thread"
CONTENDERS = {
    PLAIN: lambda: plain_way(2, THREADS),
    FASTEST: lambda: plain_way(1, 1),
    "`train.py`": train_py,
    "`train.py --threads 2`": lambda: train_py("--threads", "2"),
    "`train.py --runs 2`": lambda: train_py("--runs", "2", "--jobs", "2"),
}


def main() -> None:
    parser = utils.Parser(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=utils.number(int, 1), default=5, help="timings of each")
    repeats = parser.parse_args().repeats

    rates = {name: [] for name in CONTENDERS}
    for name in tqdm(list(rates) * repeats, disable=None):
        rates[name].append(CONTENDERS[name]())
    cpu = f"{several.available_cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{cpu}; torch {torch.__version__}; medians of {repeats}\n")
    print("| training | images/s | × plain | × fastest plain |")
    print("|---|---:|---:|---:|")
    median = {name: statistics.median(found) for name, found in rates.items()}
    for name, rate in median.items():
        ratios = rate / median[PLAIN], rate / median[FASTEST]
        print(f"| {name} | {rate:,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    utils.run_script(main)
