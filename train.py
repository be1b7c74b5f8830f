"""Train the network on MNIST: `python train.py`. All flags: `python train.py --help`."""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import utils
from model import ACTIVATIONS, MAX_WIDTH, Net, count_parameters
from utils import Loader, Split, UserError, number

LOGS = 20  # readings of the loss in an epoch; each makes a GPU wait
STATISTICS_IMAGES = 2000  # at most; they measure the batch statistics of the averaged network


@dataclass
class Run:
    """The state of a training."""

    recipe: dict[str, Any]  # the settings of parse_args
    data_crc: int  # checksum of all training images and labels, also of those held out
    teacher_crcs: list[int]  # checksums of their files, which may move and must not change
    loader: Loader
    model: Net
    average: Net  # has the averaged weights of `model`; it is measured and saved
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    dropout_rates: dict[nn.Module, float]  # the initial rate of each dropout layer of `model`
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry an epoch


# --- Training ---


def train_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """Train epoch number `epoch` (from 0) and return its entry of the history.

    The lists "train_losses" and "learning_rates" have at most LOGS values: the mean loss since the
    last one, and the rate of the next step.
    """
    start = time.perf_counter()
    recipe = run.recipe
    epoch_steps = len(run.loader)
    total_steps = recipe["epochs"] * epoch_steps
    first_rate = learning_rate(run)
    learning_rates, loss_sums, counts = [], [], []  # at each log
    loss_sum = correct = seen = 0
    run.model.train()
    torch.manual_seed(utils.derive_seed(utils.DROPOUT, recipe["seed"], epoch))
    bar = tqdm(
        run.loader.batches(epoch), f"Epoch {epoch + 1}/{recipe['epochs']}", total_steps,
        initial=epoch * epoch_steps, leave=False, disable=None, dynamic_ncols=True,
    )
    for step, (images, labels, index) in enumerate(bar, epoch * epoch_steps):
        factor = dropout_factor(step / total_steps, recipe["dropout_until"])
        set_dropout(run.dropout_rates, factor)
        run.optimizer.zero_grad()
        logits = run.model(images)
        loss = run.loss_fn(logits, labels, images)
        loss.backward()
        run.optimizer.step()
        run.scheduler.step()
        update_average(run.average, run.model, step)

        run.loader.losses[index] = F.cross_entropy(logits.detach(), labels, reduction="none")
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if (step + 1) * LOGS // epoch_steps > step * LOGS // epoch_steps:  # also the last step
            loss_sums.append(loss_sum.item())
            counts.append(seen)
            learning_rates.append(learning_rate(run))
            bar.set_postfix(loss=f"{loss_sums[-1] / seen:.4f}", refresh=False)
    return {
        "epoch": epoch + 1,
        "learning_rate": first_rate,
        "learning_rates": learning_rates,
        "train_loss": loss_sums[-1] / seen,
        "train_losses": (np.diff(loss_sums, prepend=0) / np.diff(counts, prepend=0)).tolist(),
        "train_accuracy": correct.item() / seen,
        "seconds": time.perf_counter() - start,
    }


def learning_rate(run: Run) -> float:
    """The rate of the next step, in the first parameter group."""
    return float(run.scheduler.get_last_lr()[0])


@torch.no_grad()
def update_average(average: Net, model: Net, step: int) -> None:
    """Move the weights of `average` towards those of `model`; step 0 copies them.

    This averages about the last tenth of the steps: polynomial-decay averaging (Shamir & Zhang,
    2013).
    """
    for averaged, current in zip(average.parameters(), model.parameters()):
        averaged.lerp_(current, 10 / (10 + step))


def dropout_factor(progress: float, until: float) -> float:
    """The factor of all dropout rates at `progress` (0 to 1) of the run: it falls to 0 at `until`.

    Early dropout, after Liu et al., "Dropout Reduces Underfitting" (ICML 2023). With an `until` of
    0 there is no dropout. With 1 it is constant.
    """
    if until == 0:
        return 0.0
    if until == 1:
        return 1.0
    return max(0.0, 1 - progress / until)


def find_dropout(model: Net) -> dict[nn.Module, float]:
    """The dropout layers of `model` with their rates."""
    return {m: m.p for m in model.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))}


def set_dropout(rates: dict[nn.Module, float], factor: float) -> None:
    """Set each layer's rate to `factor` times its rate in `rates`."""
    for layer, rate in rates.items():
        layer.p = rate * factor


def make_loss(recipe: dict[str, Any], device: torch.device) -> Callable[..., Tensor]:
    """The loss of logits (B, 10), labels (B,) and images (B, 1, 28, 28): a number."""
    if not recipe["teacher"]:
        return lambda logits, labels, images: F.cross_entropy(logits, labels)
    from extras import teachers

    return teachers.make_loss(recipe, device)


# --- One run ---


def train(args: argparse.Namespace, recipe: dict[str, Any]) -> int:
    """Train, from the beginning or from last.pt; returns the exit status."""
    torch.set_num_threads(recipe["threads"])
    device = utils.choose_device(args.device)
    everything = utils.load_mnist(args.data_dir, train=True, device=device)
    train_split, val_split = utils.make_splits(everything, recipe)
    splits = {}  # to measure; the folds need no test set
    if val_split is not None:
        splits["val"] = val_split
    if not recipe["folds"]:
        splits["test"] = utils.load_mnist(args.data_dir, train=False, device=device)
    if args.dry_run:
        few = slice(8 * recipe["batch_size"])
        train_split = train_split.select(few)
        splits = {name: split.select(few) for name, split in splits.items()}
    run = build_run(recipe, train_split, utils.checksum(everything), device)
    with utils.locked(args.out):
        if args.resume and (args.out / "last.pt").exists():
            restore(run, args.out / "last.pt")
        announce(run, args.out, device)
        board = None
        if args.tensorboard:
            from extras.board import Board

            board = Board(args.tensorboard / args.out.resolve().name, run)
        try:
            for epoch in range(len(run.history), recipe["epochs"]):
                end_epoch(run, train_epoch(run, epoch), splits.get("val"), args.out)
                if board:
                    board.log_epoch(run.history[-1])
            metrics = finish(run, splits, args.out)
        except KeyboardInterrupt:
            print(f"\nStopped. {what_is_kept(run, args)}", file=sys.stderr)
            return 130
        if board:
            board.finish(recipe, metrics)
    return 0


def build_run(recipe: dict[str, Any], split: Split, data_crc: int, device: torch.device) -> Run:
    """A run on the training images `split` before its first step."""
    torch.manual_seed(utils.derive_seed(utils.WEIGHTS, recipe["seed"]))
    settings = ("width", "activation", "dropout", "fc_dropout")
    model = utils.to_device(Net(**{name: recipe[name] for name in settings}), device)
    average = copy.deepcopy(model).requires_grad_(False)
    set_dropout(find_dropout(average), 0)  # update_bn would apply it
    variants = None
    if recipe["variants"]:
        from extras.variants import draw_variants

        variants = draw_variants(split, recipe["seed"])
    teacher_crcs = [zlib.crc32(Path(path).read_bytes()) for path in recipe["teacher"]]
    loader = Loader(split, recipe, variants)
    optimizer = utils.make_optimizer(
        model, recipe["lr"], recipe["momentum"], recipe["weight_decay"]
    )
    steps = recipe["epochs"] * len(loader)
    scheduler = utils.make_schedule(
        optimizer, recipe["lr"], recipe["peak_lr"], recipe["warmup"], steps
    )
    return Run(
        recipe, data_crc, teacher_crcs, loader, model, average,
        make_loss(recipe, device), optimizer, scheduler, find_dropout(model),
    )


def announce(run: Run, out: Path, device: torch.device) -> None:
    """Say what is trained, and what it replaces."""
    epochs = run.recipe["epochs"]
    if run.history:
        print(f"Resuming {out} after epoch {len(run.history)} of {epochs}")
        return
    threads = run.recipe["threads"]
    where = str(device)
    if device.type == "cpu":
        where += f", {threads} thread{'s' * (threads > 1)}"
    count = len(run.loader.split)
    print(f"Training {count_parameters(run.model):,} parameters on {count:,} images; {where}")
    if (out / "last.pt").exists():
        print(f"Replaces {out}, a training that is not finished; to go on with it, add --resume")
    elif (out / "model.pt").exists():
        print(f"Replaces {out / 'model.pt'}")
    hard = ""
    if run.recipe["hard_fraction"] and epochs > 1:
        hard = f", {run.recipe['hard_fraction']:.0%} of them hard from epoch 2 on"
    print(f"Train loss and accuracy are of augmented images{hard}; on plain images both are better")


def end_epoch(run: Run, entry: dict[str, Any], val_split: Split | None, out: Path) -> None:
    """Measure the averaged network, add `entry` to the history, write last.pt, print the log."""
    update_statistics(run)
    if not all(weights.isfinite().all() for weights in run.average.state_dict().values()):
        raise UserError(f"the weights are not finite after epoch {entry['epoch']}; "
                        "try a lower --peak-lr")
    if val_split is not None:
        entry.update(measure_on("val", run.average, val_split))
    history = [*run.history, entry]
    save(run, out / "last.pt", history=history, metrics={}, training=training_state(run))
    run.history = history  # what_is_kept counts saved epochs
    print_epoch(entry)


def update_statistics(run: Run) -> None:
    """Measure the batch statistics of the averaged network on plain images.

    Augmentation blurs images, and so it changes their statistics.
    """
    for averaged, current in zip(run.average.buffers(), run.model.buffers()):
        averaged.copy_(current)  # BatchNorm's are replaced below
    images = run.loader.split.images
    images = images[:: math.ceil(len(images) / STATISTICS_IMAGES)]
    batches = images.tensor_split(math.ceil(len(images) / 500))  # equal ones, as update_bn assumes
    update_bn((batch / 255 for batch in batches), run.average)


def print_epoch(entry: dict[str, Any]) -> None:
    """Print the log of one epoch in the specification's format."""
    print(f"Epoch {entry['epoch']}\nLearning rate: {entry['learning_rate']:.6f}")
    print(f"Train Loss: {entry['train_loss']:.4f} | Accuracy: {entry['train_accuracy']:.2%}")
    if "val_accuracy" in entry:
        print(f"Validation Loss: {entry['val_loss']:.4f} | Accuracy: {entry['val_accuracy']:.2%}")


def finish(run: Run, splits: dict[str, Split], out: Path) -> dict[str, float]:
    """Measure with one look and with nine, let model.pt replace last.pt; returns the metrics."""
    metrics: dict[str, float] = {}
    for name, split in splits.items():
        metrics.update(measure_on(name, run.average, split))
        metrics.update(measure_on(f"{name}_tta", run.average, split, tta=True))
    save(run, out / "model.pt", history=run.history, metrics=metrics)
    (out / "last.pt").unlink()
    print_result(run.history, metrics)
    return metrics


def print_result(history: list[dict[str, Any]], metrics: dict[str, float]) -> None:
    """Print the accuracy after the last epoch, and the time of all."""
    name = "test" if "test_accuracy" in metrics else "val"
    title = utils.SPLITS[name].capitalize()
    print(f"Final {title} Accuracy: {metrics[f'{name}_accuracy']:.2%}")
    minutes, seconds = divmod(round(sum(entry["seconds"] for entry in history)), 60)
    print(f"Trained in {minutes} min {seconds} s")


def measure_on(name: str, model: Net, split: Split, tta: bool = False) -> dict[str, float]:
    """Loss and accuracy of `model` on `split`, called "val_loss" and "val_accuracy" for "val"."""
    measured = utils.measure(utils.predict(model, split.images, tta), split.labels)
    return {f"{name}_{key}": value for key, value in measured.items()}


# --- Stop and resume ---


def save(run: Run, path: Path, **contents: Any) -> None:
    """Write a checkpoint of the averaged network."""
    utils.save_checkpoint(
        path, run.average, recipe=run.recipe, data_crc=run.data_crc,
        teacher_crcs=run.teacher_crcs, **contents,
    )


def training_state(run: Run) -> dict[str, Any]:
    """What `restore` needs beside the averaged network."""
    return {
        "types": [type(run.optimizer).__name__, type(run.scheduler).__name__],
        "weights": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "losses": run.loader.losses,
    }


def restore(run: Run, path: Path) -> None:
    """Put `run` where `end_epoch` wrote `path`; UserError if data, teachers or code changed."""
    average, checkpoint = utils.load_model(path, "cpu")
    if checkpoint["data_crc"] != run.data_crc:
        raise UserError(f"{path} was trained on other images or labels; "
                        "give the --data-dir of that run, or another --out")
    if checkpoint["teacher_crcs"] != run.teacher_crcs:
        raise UserError(f"{path} has learnt from other networks than those of --teacher")
    try:
        state = checkpoint["training"]
        types = training_state(run)["types"]
        if state["types"] != types:
            raise ValueError(f"{' and '.join(state['types'])}, not {' and '.join(types)}")
        run.model.load_state_dict(state["weights"])
        run.average.load_state_dict(average.state_dict())
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        run.loader.losses.copy_(state["losses"])
    except (KeyError, RuntimeError, ValueError) as error:
        why = utils.one_line(error)
        raise UserError(f"{path} is of another optimiser or schedule ({why})") from error
    run.history = checkpoint["history"]


def what_is_kept(run: Run, args: argparse.Namespace) -> str:
    """What a stopped training leaves, and how to go on."""
    if args.dry_run or not (run.history or (args.out / "last.pt").exists()):
        return "Nothing is kept of this training; the same command starts it again."
    if not run.history:
        return "Nothing is kept of this training; --resume goes on with the one before it."
    kept = f"{len(run.history)} of {run.recipe['epochs']} epochs are kept"
    return f"{kept}; the same command with --resume goes on."


def resumed_recipe(checkpoint: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """The recipe of `checkpoint`; UserError if flags in `argv` differ, but for --teacher."""
    stored = checkpoint["recipe"]
    _, recipe = parse_args(argv, argparse.Namespace(**stored))
    utils.check_same(checkpoint["path"], stored, recipe)
    return recipe


# --- The command line ---


def parse_args(
    argv: list[str], stored: argparse.Namespace | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the recipe: the settings that a trained network depends on.

    Settings that no flag gives are those of `stored`, or the defaults.
    """
    parser = utils.Parser(description="Train the network of model.py on MNIST.")
    add = parser.add_argument_group("recipe (saved in the checkpoint)").add_argument
    share = number(float, 0, 1)
    size = number(int, 0)
    recipe_flags = [
        add("--epochs", type=number(int, 1, 100_000), default=20, help="epochs to train"),
        add("--batch-size", type=number(int, 2, 65_536), default=64, help="images in a step"),
        add("--lr", type=number(float, 1e-12, 1e6), default=0.015, help="rate of the first step"),
        add("--peak-lr", type=number(float, 1e-12, 1e6), default=0.15, help="highest rate"),
        add("--warmup", type=share, default=0.2, help="share of the run until the highest rate"),
        add("--momentum", type=number(float, 0, 0.9999), default=0.9, help="Nesterov momentum"),
        add("--weight-decay", type=share, default=1e-4, help="L2 penalty"),
        add("--dropout", type=number(float, 0, 0.95), nargs=4, default=[0.1, 0.2, 0.3, 0.4],
            help="initial dropout rates of the blocks"),
        add("--fc-dropout", type=number(float, 0, 0.95), default=0.4,
            help="initial dropout rate between the linear layers"),
        add("--dropout-until", type=share, default=0.1,
            help="dropout falls to 0 over this share of the run; with 1 it is constant"),
        add("--rotation", type=number(float, 0, 180), default=10.0, help="degrees, either way"),
        add("--scale", type=number(float, 0, 0.9), default=0.1, help="0.1: factors 0.9 to 1.1"),
        add("--translate", type=share, default=0.05, help="share of the side, either way"),
        add("--shear", type=number(float, 0, 60), default=10.0, help="degrees, either way"),
        add("--elastic", type=number(float, 0, 10), default=0.35,
            help="standard deviation of elastic distortion, in pixels"),
        add("--hard-fraction", type=share, default=0.5,
            help="share of hard images after the first epoch; 0: all images equally often"),
        add("--variants", action="store_true",
            help="draw a slash, flag, bar or tail on some 0, 1, 7 and 9"),
        add("--width", type=number(int, 1, MAX_WIDTH), default=1,
            help="factor of all hidden layers' widths; a wide network can be a teacher"),
        add("--activation", choices=tuple(ACTIVATIONS), default="silu", help="of all layers"),
        add("--teacher", nargs="+", default=[], metavar="PATH",
            help="distillation: checkpoints, or folders of runs, to learn from"),
        add("--train-size", type=size, default=0, help="training images, stratified; 0: all"),
        add("--val-size", type=size, default=0,
            help="training images to hold out, stratified, and to measure each epoch"),
        add("--folds", type=size, default=0, help="stratified folds for cross-validation"),
        add("--fold", type=size, default=0, help="the one fold to hold out; 0: each in turn"),
        add("--threads", type=number(int, 1, 1024), default=1,
            help="CPU threads; more are slower on a busy machine and change results slightly"),
        add("--seed", type=number(int, 0, 2**31), default=0, help="seed of all random numbers"),
    ]
    utils.add_common_flags(parser)
    flag = parser.add_argument
    flag("--out", type=Path, default=Path("checkpoints"), metavar="DIR",
        help="folder of the checkpoints, and of the logs of several runs")
    flag("--resume", action="store_true", help="go on with the training in --out, or start one")
    flag("--runs", type=number(int, 1), default=1, help="number of trainings, each with its seed")
    flag("--jobs", type=number(int, 1),
        help="processes for --runs or --folds; default: one a core, or 1 on a GPU")
    flag("--tensorboard", type=Path, nargs="?", const=Path("runs"), metavar="DIR",
        help="write curves, images and hyperparameters for TensorBoard")
    flag("--dry-run", action="store_true", help="try everything with a few steps; keep nothing")
    args = parser.parse_args(argv, stored)
    recipe = {each.dest: getattr(args, each.dest) for each in recipe_flags}
    if recipe["folds"] == 1 or recipe["fold"] > recipe["folds"]:
        raise UserError("--folds must be 2 or more, and --fold one of them")
    if recipe["folds"] and (recipe["val_size"] or args.runs > 1):
        raise UserError("--folds goes neither with --val-size nor with --runs")
    if recipe["teacher"]:
        from extras import teachers

        recipe["teacher"] = teachers.find(recipe["teacher"], args.out)
    return args, recipe


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, recipe = parse_args(argv)
    if args.dry_run:
        return dry_run(args, recipe)
    if args.runs > 1 or (recipe["folds"] and not recipe["fold"]):
        from extras import several

        return several.run(args, recipe, [sys.executable, __file__, *argv])
    if args.resume:
        last = args.out / "last.pt"
        model = args.out / "model.pt"
        if last.exists():
            recipe = resumed_recipe(utils.load_checkpoint(last), argv)
        elif model.exists():
            checkpoint = utils.load_checkpoint(model)
            recipe = resumed_recipe(checkpoint, argv)
            print(f"{args.out} is finished")
            print_result(checkpoint["history"], checkpoint["metrics"])
            return 0
        elif any(args.out.glob("*/*.pt")):
            raise UserError(f"{args.out} holds several runs: repeat --runs or --folds, "
                            "or give the folder of one as --out")
        else:
            print(f"--resume found no training in {args.out}: a new one starts")
    return train(args, recipe)


def dry_run(args: argparse.Namespace, recipe: dict[str, Any]) -> int:
    """Train two epochs of a few steps in a temporary folder, and read the checkpoint back."""
    recipe["epochs"] = min(2, recipe["epochs"])
    if recipe["folds"] and not recipe["fold"]:
        recipe["fold"] = 1
    args.resume = False
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder) / "out"
        args.tensorboard = args.tensorboard and Path(folder) / "runs"
        status = train(args, recipe)
        if status == 0:
            utils.load_model(args.out, "cpu")
            print("Dry run: a few steps on a few images. The accuracy means nothing. "
                  "Nothing was kept.")
    return status


if __name__ == "__main__":
    utils.run_script(main)
