"""How fast is training on a CPU, compared with the plain way? `python extras/benchmark.py` prints a table.

Each timing has its own processes, so that no thread pool disturbs another. They load their data, warm up and wait for
each other before the clock starts. All are timed in turns, alone and beside a process that keeps one core busy, and
the medians are printed. Close your browser first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
import utils
from extras import several

CPU = torch.device("cpu")
THREADS = torch.get_num_threads()  # PyTorch's default, before run_script sets 1
IMAGES = 6400  # trained on in one timing: 100 steps

Work = Callable[[], object]  # what is timed, after its warm-up: training on so many IMAGES


class Contender(NamedTuple):
    """Processes that each call `prepare` and then do its work, at the same time; with `busy` one core is busy."""

    name: str
    prepare: Callable[[], Work]
    threads: int = 1
    processes: int = 1
    busy: bool = False


class Digits(Dataset):
    """MNIST's training images as torchvision's own class returns them: transformed PIL images, and labels."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        split = utils.load_mnist(ROOT / "data", train=True, device=CPU)
        self.images, self.labels, self.transform = split.images[:, 0].numpy(), split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_network() -> nn.Sequential:
    """The same network as it is usually written."""

    def block(c_in: int, c_out: int, kernel: int, pool: nn.Module, p: float) -> list[nn.Module]:
        conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        return [conv, nn.BatchNorm2d(c_out), nn.ReLU(), pool, nn.Dropout(p)]

    return nn.Sequential(
        *block(1, 12, 3, nn.MaxPool2d(2), 0.1),
        *block(12, 24, 3, nn.MaxPool2d(2), 0.2),
        *block(24, 24, 3, nn.Identity(), 0.3),
        *block(24, 12, 1, nn.Identity(), 0.4),
        *[nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(108, 72), nn.ReLU(), nn.Dropout(0.4), nn.Linear(72, 10)],
    )


AFFINE = transforms.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=10)


def plain_loader(workers: int, augment: Callable = AFFINE) -> DataLoader:
    """PIL images and torchvision's transforms."""
    transform = transforms.Compose([augment, transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    return DataLoader(Digits(transform), batch_size=64, shuffle=True, num_workers=workers)


def plain_optimizer(model: nn.Module) -> torch.optim.SGD:
    """The specification's, as it is usually written."""
    return torch.optim.SGD(model.parameters(), 0.015, momentum=0.9, nesterov=True, weight_decay=1e-4)


def plain_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> None:
    """The steps of one epoch, with `loss.item()` in each."""
    total_loss = 0.0
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total_loss += loss.item()


def plain_way(workers: int) -> Work:
    """The usual training loop."""
    batches, model = iter(plain_loader(workers)), plain_network()
    optimizer = plain_optimizer(model)
    plain_epoch(model, optimizer, islice(batches, 16))  # until the workers' first batches are used up
    return lambda: plain_epoch(model, optimizer, islice(batches, IMAGES // 64))


def train_py() -> Work:
    """A short run of train.py's own loop, with its share of steps that have dropout."""
    split = utils.load_mnist(ROOT / "data", train=True, device=CPU)

    def train_on(images: int) -> None:
        run = train.build_run(train.Recipe(epochs=1), split.select(slice(images)), 0, CPU)
        train.train_epoch(run, epoch=0)

    train_on(640)
    return partial(train_on, IMAGES)


PLAIN = Contender(f"plain way: 2 workers, {THREADS} threads", partial(plain_way, 2), THREADS)
PLAIN_AT_ITS_FASTEST = Contender("plain way: 1 worker, 1 thread", partial(plain_way, 1))
TRAINING = [
    PLAIN,
    PLAIN_AT_ITS_FASTEST,
    Contender("train.py", train_py),
    Contender("train.py --threads 2", train_py, threads=2),
    Contender("train.py --runs 2", train_py, processes=2),
]
SPIN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with its parent


def images_per_second(contender: Contender) -> float:
    """One timing: the sum over the contender's processes."""
    context = torch.multiprocessing.get_context("spawn")
    start, rates = context.Barrier(contender.processes), context.SimpleQueue()
    neighbour = subprocess.Popen([sys.executable, "-c", SPIN if contender.busy else "pass"])
    try:
        torch.multiprocessing.spawn(time_here, (contender, start, rates), nprocs=contender.processes)
    finally:
        neighbour.kill()
        neighbour.wait()
    return sum(rates.get() for _ in range(contender.processes))


def time_here(_rank: int, contender: Contender, start: Any, rates: Any) -> None:
    """In a process of its own: get ready, wait for the others at `start`, put images per second into `rates`."""
    torch.set_num_threads(contender.threads)
    work = contender.prepare()
    start.wait()
    began = time.perf_counter()
    work()
    rates.put(IMAGES / (time.perf_counter() - began))


def print_table(rates: dict[Contender, float]) -> None:
    """Images per second and ratios to the plain way, on a quiet machine and beside a busy core."""
    print("| training | images/s | × plain | × its fastest | one core busy | × plain |\n|---|---:|---:|---:|---:|---:|")
    for row in TRAINING:
        rate, busy = rates[row], rates[row._replace(busy=True)]
        ratios = f"{rate / rates[PLAIN]:.2f} | {rate / rates[PLAIN_AT_ITS_FASTEST]:.2f}"
        print(f"| {row.name} | {rate:,.0f} | {ratios} | {busy:,.0f} | {busy / rates[PLAIN._replace(busy=True)]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=utils.positive, default=5, help="timings of each (default: %(default)s)")
    args = parser.parse_args()

    contenders = [*TRAINING, *(row._replace(busy=True) for row in TRAINING)]
    timings: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(args.repeats):
        for contender, rates in timings.items():
            rates.append(images_per_second(contender))
            where = ", one core busy" if contender.busy else ""
            print(f"{repeat + 1}/{args.repeats} {contender.name}{where}: {rates[-1]:,.1f} images/s", file=sys.stderr)
    medians = {contender: statistics.median(rates) for contender, rates in timings.items()}

    print(f"{several.available_cores()} cores, {torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}")
    print(f"Medians of {args.repeats}\n")
    print_table(medians)


if __name__ == "__main__":
    utils.run_script(main)
