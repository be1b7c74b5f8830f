"""How fast is training, against everybody's way and against the machine: `python tests/benchmark.py`.

The reference is the same network as most repositories train it: default memory format, ReLU before
pooling, torchvision's transforms on PIL images in a DataLoader, plain SGD, `loss.item()` each step.
Ours is `train.Trainer.train_epoch` itself. All are timed in turns in one process; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
import utils  # noqa: E402
from model import Net, layer_table  # noqa: E402

FIRST_STEP = """
import sys, train, utils
args = train.parse_args(sys.argv[1:])
device = utils.choose_device(args.device)
trainer = train.Trainer(args.recipe, utils.load_mnist(args.data_dir, True, device), device)
trainer.step.begin_epoch(1.0)
trainer.step(*next(iter(trainer.loader)))
float(trainer.step.losses[0])
"""


def plain_network() -> nn.Sequential:
    """The seed's network as it is usually written."""

    def block(c_in: int, c_out: int, kernel: int, p: float, pool: bool) -> list[nn.Module]:
        layers: list[nn.Module] = [
            nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
        ]
        return [*layers, nn.MaxPool2d(2), nn.Dropout(p)] if pool else [*layers, nn.Dropout(p)]

    return nn.Sequential(
        *block(1, 12, 3, 0.1, True), *block(12, 24, 3, 0.2, True), *block(24, 24, 3, 0.3, False),
        *block(24, 12, 1, 0.4, False), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(108, 72), nn.ReLU(),
        nn.Dropout(0.4), nn.Linear(72, 10),
    )  # fmt: skip


class Reference:
    """Everybody's training loop; called, it trains on some batches and returns seconds per image."""

    def __init__(self, data_dir: Path, device: torch.device, workers: int, threads: int, images: int) -> None:
        augment = transforms.Compose([
            transforms.RandomRotation(10), transforms.RandomAffine(0, (0.1, 0.1), (0.9, 1.1), 10),
            transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,)),
        ])  # fmt: skip
        dataset = MNIST(str(data_dir), train=True, transform=augment)
        self.loader = DataLoader(
            dataset, batch_size=64, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda"
        )
        self.model = plain_network().to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.015, momentum=0.9, nesterov=True, weight_decay=1e-4)
        self.device, self.threads, self.batches = device, threads, images // 64

    def __call__(self) -> float:
        torch.set_num_threads(self.threads)
        batches = iter(self.loader)
        for x, y in islice(batches, 16):  # until the workers run at their own pace
            self.step(x, y)
        start = time.perf_counter()
        for x, y in islice(batches, self.batches):
            self.step(x, y)
        return (time.perf_counter() - start) / (64 * self.batches)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.to(self.device), y.to(self.device)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        loss.item()


class Ours:
    """train.py's epoch; called, it returns seconds per image, over the run's mix of epochs with dropout and without."""

    def __init__(self, data_dir: Path, device: torch.device, threads: int, images: int, eager: bool) -> None:
        split = utils.load_mnist(data_dir, train=True, device=device)
        self.recipe = train.parse_args([]).recipe
        self.trainer = train.Trainer(self.recipe, utils.Split(*(t[:images] for t in split)), device, eager)
        self.threads = threads
        self.trainer.train_epoch(0)

    def __call__(self) -> float:
        torch.set_num_threads(self.threads)
        epochs, until = self.recipe["epochs"], self.recipe["dropout_until"]
        with_dropout = sum(train.dropout_factor(e, epochs, until) > 0 for e in range(epochs)) / epochs
        seconds = [self.trainer.train_epoch(epoch)["seconds"] for epoch in (0, epochs - 1)]
        mean = with_dropout * seconds[0] + (1 - with_dropout) * seconds[1]
        return mean / len(self.trainer.loader.split.labels)


class Floor:
    """Seconds per image if every multiply-accumulate ran at the rate of a large matrix product."""

    def __init__(self, device: torch.device, threads: int) -> None:
        size = 1536 if device.type == "cpu" else 8192
        self.a, self.b = torch.randn(2, size, size, device=device).unbind(0)
        rows = layer_table(Net())
        first = next(r.macs for r in rows if r.macs)  # the image itself needs no gradient
        self.flop = 2 * (3 * sum(r.macs for r in rows) - first)
        self.device, self.threads = device, threads

    def __call__(self) -> float:
        torch.set_num_threads(self.threads)
        seconds = timed(lambda: self.a @ self.b, self.device, repeats=5)
        return seconds * self.flop / (2 * self.a.numel() * self.a.shape[1])


def timed(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call of `work`, the mean of `repeats` after a first one."""
    work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine(device: torch.device) -> str:
    """One line that says where the figures come from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
        capability = torch.backends.cpu.get_cpu_capability()
        name = (
            f"{models[0].split(':')[1].strip() if models else 'CPU'}, {torch.get_num_threads()} threads, {capability}"
        )
    return f"{name}; torch {torch.__version__}"


def profile_epoch(ours: Ours, rows: int = 14) -> str:
    """Where one epoch without dropout spends its time: the `rows` dearest operations, their own time alone."""
    torch.set_num_threads(ours.threads)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        ours.trainer.train_epoch(ours.recipe["epochs"] - 1)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = ["| operation | share | calls a step |", "|---|---:|---:|"]
    for event in events[:rows]:
        calls = event.count / len(ours.trainer.loader)
        lines.append(f"| {event.key} | {100 * event.self_cpu_time_total / total:.1f}% | {calls:.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    utils.add_common_flags(parser)
    parser.add_argument("--repeats", type=utils.in_range(int, 5), default=5, help="timings of each (default: 5)")
    parser.add_argument("--images", type=utils.in_range(int, 640), help="images a timing (default: 6400; GPU 60000)")
    parser.add_argument("--profile", action="store_true", help="also show where train.py's epoch spends its time")
    args = parser.parse_args()
    device, threads = utils.choose_device(args.device), torch.get_num_threads()
    images = args.images or (6400 if device.type == "cpu" else 60_000)
    utils.prepare_mnist(args.data_dir)

    def reference(workers: int, threads: int) -> Reference:
        return Reference(args.data_dir, device, workers, threads, min(images, 6400))

    contenders: dict[str, Callable[[], float]] = {
        f"reference: 2 workers, {threads} threads": reference(2, threads),
        "reference: 1 worker, 1 thread": reference(1, 1),
        f"train.py, {threads} threads": Ours(args.data_dir, device, threads, images, eager=False),
    }
    if device.type == "cuda":
        contenders["train.py --eager"] = Ours(args.data_dir, device, threads, images, eager=True)
    else:
        contenders["train.py --threads 1"] = Ours(args.data_dir, device, 1, images, eager=False)
    contenders["floor: matrix product"] = Floor(device, threads)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(args.repeats):
        for name, contender in contenders.items():
            times[name].append(contender())
        print(f"repeat {repeat + 1} of {args.repeats} done", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in times.items()}

    torch.set_num_threads(threads)
    base, *_, floor = medians.values()
    fastest = min(seconds for name, seconds in medians.items() if name.startswith("reference"))
    print(f"{machine(device)}; medians of {args.repeats}\n")
    print("| training | images/s | s/epoch | × reference | × fastest reference | of the floor |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, seconds in medians.items():
        ratios = f"{base / seconds:.2f} | {fastest / seconds:.2f} | {100 * floor / seconds:.1f}%"
        print(f"| {name} | {1 / seconds:,.0f} | {60_000 * seconds:.1f} | {ratios} |")
    if args.profile:
        print("\n" + profile_epoch(contenders[f"train.py, {threads} threads"]))
    test = utils.load_mnist(args.data_dir, train=False, device=device)
    model = utils.place(Net(), device)
    evaluation = statistics.median(timed(lambda: utils.predict(model, test), device) for _ in range(args.repeats))
    command = [sys.executable, "-c", FIRST_STEP, "--data-dir", str(args.data_dir.resolve()), "--device", device.type]
    start_up = statistics.median(
        timed(lambda: subprocess.run(command, cwd=ROOT, check=True), torch.device("cpu")) for _ in range(args.repeats)
    )
    print(f"\nEvaluation of {len(test.labels):,} images: {evaluation:.2f} s")
    print(f"From `python train.py` to the end of the first step: {start_up:.1f} s")
    return 0


if __name__ == "__main__":
    utils.run_script(main)
