"""Several trainings side by side, and their statistics: `train.py --runs` and `--folds`."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import utils
from utils import UserError

TITLES = {
    "val_accuracy": "Validation, one look",
    "val_tta_accuracy": "Validation, nine looks",
    "test_accuracy": "Test, one look",
    "test_tta_accuracy": "Test, nine looks",
}


def run(args: argparse.Namespace, recipe: dict[str, Any], command: list[str]) -> int:
    """Run `command`, of train.py, once for each seed or fold, several at a time; then summarise.

    Returns the exit status. UserError if one fails, or --resume finds another recipe.
    """
    if recipe["folds"]:
        flags = {f"fold-{k}": f"--fold {k}" for k in range(1, recipe["folds"] + 1)}
    else:
        seeds = range(recipe["seed"], recipe["seed"] + args.runs)
        flags = {f"seed-{seed}": f"--runs 1 --seed {seed}" for seed in seeds}
    commands = {}
    replaced = []
    for name, its_flags in flags.items():
        folder = args.out / name
        # Of two equal flags the last one counts.
        commands[folder] = [*command, *its_flags.split(), "--out", str(folder)]
        if args.tensorboard:
            board = args.tensorboard / args.out.resolve().name  # train.py adds the run's name
            commands[folder] += ["--tensorboard", str(board)]
        if args.resume:
            check_resumable(folder, recipe)
        elif any(folder.glob("*.pt")):
            replaced.append(name)
    if replaced:
        print(f"Replaces {', '.join(replaced)} in {args.out}; to go on with them, add --resume")
    is_cpu = utils.choose_device(args.device).type == "cpu"
    jobs = args.jobs or (max(1, available_cores() // recipe["threads"]) if is_cpu else 1)
    with utils.locked(args.out):
        try:
            failed = run_side_by_side(commands, jobs, recipe["epochs"], args.resume)
        except KeyboardInterrupt:
            print("\nStopped. Finished epochs are kept; the same command with --resume goes on.",
                  file=sys.stderr)
            return 130
    if failed:
        raise UserError(f"{', '.join(failed)} failed: see log.txt there; once the cause is mended, "
                        "the same command with --resume goes on")
    summarize(args.out, list(commands))
    return 0


def check_resumable(folder: Path, recipe: dict[str, Any]) -> None:
    """UserError if `folder` holds a run whose recipe differs in more than seed and fold."""
    for path in (folder / "last.pt", folder / "model.pt"):
        if path.exists():
            stored = utils.load_checkpoint(path)["recipe"]
            stored = {**stored, "seed": recipe["seed"], "fold": recipe["fold"]}
            utils.check_same(path, stored, recipe)
            return


def available_cores() -> int:
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def run_side_by_side(
    commands: dict[Path, list[str]], jobs: int, epochs: int, resume: bool
) -> list[str]:
    """Run the command of each folder, `jobs` at a time, with its output in the folder's log.txt.

    With `resume` it appends to the logs. Returns the names of the folders whose command failed.
    An interrupt also ends the commands that still run.
    """
    waiting = list(commands)
    running = {}
    failed = []
    bar = tqdm(total=epochs * len(commands), unit="epoch", disable=None, dynamic_ncols=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                running[folder] = start(commands[folder], folder / "log.txt", resume)
            time.sleep(0.2)
            started = [folder for folder in commands if folder not in waiting]
            bar.n = sum(log_text(folder).count("\nTrain Loss: ") for folder in started)
            bar.refresh()
            for folder in list(running):
                status = running[folder].poll()
                if status is None:
                    continue
                del running[folder]
                if status != 0:
                    failed.append(folder.name)
                lines = log_text(folder).splitlines() or ["no output"]
                tqdm.write(f"{folder.name}: {lines[-1]}")
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
            process.wait()
    return failed


def start(command: list[str], log: Path, resume: bool) -> subprocess.Popen:
    """Start `command`, which prints into the file `log`; UserError if that cannot be written."""
    with utils.writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a" if resume else "w") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def log_text(folder: Path) -> str:
    """What the command of `folder` has printed so far."""
    return (folder / "log.txt").read_text(errors="replace")


def summarize(out: Path, folders: list[Path]) -> None:
    """Print a table and the statistics of the runs in `folders`, and write them to runs.json."""
    found = [utils.load_checkpoint(folder / "model.pt") for folder in folders]
    runs = [{"run": each["path"].parent.name, **each["metrics"]} for each in found]
    results: dict[str, Any] = {"recipe": found[0]["recipe"], "runs": runs}
    columns = {name: title for name, title in TITLES.items() if name in runs[0]}

    print(f"\n{'Run':<8}" + "".join(f"{title:>25}" for title in columns.values()))
    for row in runs:
        print(f"{row['run']:<8}" + "".join(f"{row[name]:25.2%}" for name in columns))
    for name, title in columns.items():
        stats = statistics_of([row[name] for row in runs])
        results[name] = stats
        print(
            f"{title + ':':<24}mean {stats['mean']:.3%}  std {stats['std']:.3%}  "
            f"standard error {stats['sem']:.3%}  min {stats['min']:.2%}  max {stats['max']:.2%}  "
            f"({stats['n']} runs)"
        )
    utils.write_json(out / "runs.json", results)


def statistics_of(values: list[float]) -> dict[str, float]:
    """Mean, sample standard deviation, standard error of the mean, minimum, maximum, number."""
    std = statistics.stdev(values)
    return {
        "mean": statistics.fmean(values),
        "std": std,
        "sem": std / len(values) ** 0.5,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }
