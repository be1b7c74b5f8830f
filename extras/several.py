"""Several trainings side by side, a lock on their folders, and statistics."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import utils
from utils import UserError, say

TITLES = {
    "val_accuracy": "Validation, one look", "val_tta_accuracy": "Validation, nine looks",
    "test_accuracy": "Test, one look", "test_tta_accuracy": "Test, nine looks",
}  # fmt: skip


def available_cores() -> int:
    """Cores that this process may use: its affinity, or less where a container has a quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    quota, period = quota_file.read_text().split() if quota_file.exists() else ("max", "1")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` until the end; UserError if another training has locked it. Windows has no such locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    if os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another training writes to {folder}; wait for it or choose another --out") from error
    except OSError as error:  # some network file systems
        say("warning", f"{folder} cannot be locked ({error.strerror}); start no second training into it")
    try:
        yield
    finally:
        os.close(handle)


def run_side_by_side(commands: dict[Path, list[str]], jobs: int, epochs: int, mode: str) -> list[str]:
    """Run the command of each folder, `jobs` at a time, with its output in the folder's log.txt, under one bar.

    `mode` opens the logs: "w" or "a". Returns the names of the folders whose command failed. An interrupt also ends
    the commands that still run.
    """
    waiting, running, failed = list(commands), {}, []
    bar = tqdm(total=epochs * len(commands), unit="epoch", disable=None, dynamic_ncols=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "log.txt").open(mode) as log:
                    running[folder] = subprocess.Popen(commands[folder], stdout=log, stderr=subprocess.STDOUT)
            time.sleep(0.2)
            started = [folder for folder in commands if folder not in waiting]
            bar.n = sum(log_text(folder).count("\nTrain Loss: ") for folder in started)
            bar.refresh()
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                if running.pop(folder).returncode:
                    failed.append(folder.name)
                tqdm.write(f"{folder.name}: {(log_text(folder).splitlines() or ['no output'])[-1]}")
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
            process.wait()
    return failed


def log_text(folder: Path) -> str:
    """What the command of `folder` has printed so far."""
    return (folder / "log.txt").read_text(errors="replace")


def summarize(out: Path, folders: list[Path], data_dir: Path, device: torch.device) -> None:
    """Print a table and the statistics of the runs in `folders`, and write them to `out`/runs.json.

    For seeds that includes the accuracy of the ensemble: the mean of the networks' probabilities.
    """
    models, checkpoints = zip(*(utils.load_model(folder / "model.pt", device) for folder in folders))
    runs = [{"run": folder.name, **checkpoint["metrics"]} for folder, checkpoint in zip(folders, checkpoints)]
    columns = {name: title for name, title in TITLES.items() if name in runs[0]}
    results: dict[str, Any] = {**{name: checkpoints[0][name] for name in ("recipe", "versions")}, "runs": runs}

    print(f"\n{'Run':<8}" + "".join(f"{title:>25}" for title in columns.values()))
    for run in runs:
        print(f"{run['run']:<8}" + "".join(f"{run[name]:25.2%}" for name in columns))
    for name, title in columns.items():
        results[name] = statistics_of([run[name] for run in runs])
        print(f"{title + ':':<24}" + "mean {mean:.3%}  std {std:.3%}  standard error {sem:.3%}  min {min:.2%}  "
              "max {max:.2%}  ({n} runs)".format(**results[name]))  # fmt: skip
    if "test_accuracy" in columns:
        split = utils.load_mnist(data_dir, train=False, device=device)
        for name, tta in (("test_accuracy", False), ("test_tta_accuracy", True)):
            mean = torch.stack([utils.predict(model, split.images, tta).softmax(1) for model in models]).mean(0)
            results[f"ensemble_{name}"] = accuracy = utils.measure(mean.log(), split.labels)["accuracy"]
            print(f"{TITLES[name]}, ensemble of the {len(runs)} networks: {accuracy:.2%}")
    utils.write_json(out / "runs.json", results)


def statistics_of(values: list[float]) -> dict[str, float]:
    """Mean, sample standard deviation, standard error of the mean, minimum, maximum and number of `values`."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "sem": std / len(values) ** 0.5,
            "min": min(values), "max": max(values), "n": len(values)}  # fmt: skip
