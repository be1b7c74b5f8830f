"""Train the network on MNIST: `python train.py`. All flags: `python train.py --help`."""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import utils
from model import ACTIVATIONS, ADAPTIVE_POOLS, MAX_WIDTH, Net, count_parameters
from utils import Augmentation, Loader, Split, UserError, positive

CHECKS = 20  # of the loss in an epoch; a GPU has to wait for each
STATISTICS_EVERY = 12  # one in 12 training images measures the batch statistics of the averaged network
DISTILL_WEIGHT = 0.7  # of the teachers in the loss
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# --- The recipe -------------------------------------------------------------------------------------------------------


def setting(default: Any, help: str, range: tuple[float, float] | None = None, **argparse_kwargs: Any) -> Any:
    """A field of the recipe: its default, its help, the range of its numbers, and what else argparse needs."""
    return field(default=default, metadata={"help": help, "range": range, "argparse_kwargs": argparse_kwargs})


@dataclass(frozen=True)
class Recipe:
    """All settings that a trained network depends on: the flags of train.py, and a part of each checkpoint.

    Raises UserError for a value out of range.
    """

    epochs: int = setting(20, "epochs to train", (1, 100_000))
    batch_size: int = setting(64, "images in a step", (2, 65_536))
    lr: float = setting(0.015, "learning rate of the first step", (1e-12, 1e6))
    peak_lr: float = setting(0.15, "highest learning rate of the cycle", (1e-12, 1e6))
    warmup: float = setting(0.2, "fraction of the run in which the rate rises to its peak", (0, 1))
    momentum: float = setting(0.9, "Nesterov momentum", (0, 0.9999))
    weight_decay: float = setting(1e-4, "L2 penalty", (0, 1))
    ema_steps: float = setting(2500.0, "length of the weight average in steps; 1 disables it", (1, math.inf))
    dropout: tuple = setting(
        (0.1, 0.2, 0.3, 0.4), "initial dropout rates of the blocks", (0, 0.95), type=float, nargs=4
    )
    fc_dropout: float = setting(0.4, "initial dropout rate between the linear layers", (0, 0.95))
    dropout_until: float = setting(0.1, "fraction of the run in which dropout falls to 0; 1: constant", (0, 1))
    rotation: float = setting(10.0, "augmentation: degrees, either way", (0, 180))
    scale: float = setting(0.1, "augmentation: a factor; 0.1 is 0.9 to 1.1", (0, 0.9))
    translate: float = setting(0.05, "augmentation: fraction of the side, either way", (0, 1))
    shear: float = setting(10.0, "augmentation: degrees, either way", (0, 60))
    elastic: float = setting(0.35, "augmentation: standard deviation of elastic distortion, in pixels", (0, 10))
    hard_fraction: float = setting(0.5, "share of hard images after the first epoch; 0: show all equally often", (0, 1))
    variants: bool = setting(False, "draw a slash, flag, bar or tail on some 0, 1, 7 and 9", action="store_true")
    width: int = setting(1, "factor of all hidden layers' widths; wider ones make teachers", (1, MAX_WIDTH))
    activation: str = setting("silu", "activation of the blocks and the first linear layer", choices=tuple(ACTIVATIONS))
    adaptive_pool: str = setting("max", "pooling after the blocks", choices=tuple(ADAPTIVE_POOLS))
    teacher: tuple = setting((), "distillation: checkpoints, or folders of runs, to learn from", nargs="+", type=str)
    train_size: int = setting(0, "training images to use, stratified; 0: all", (0, math.inf))
    val_size: int = setting(0, "training images to hold out, stratified, and to measure each epoch", (0, math.inf))
    folds: int = setting(0, "folds of the training images for stratified cross-validation", (0, math.inf))
    fold: int = setting(0, "the one fold to hold out, 1 to FOLDS; 0: each in turn", (0, math.inf))
    threads: int = setting(1, "CPU threads; more are slower on a busy machine and change results slightly", (1, 1024))
    seed: int = setting(0, "seed of all random numbers", (0, 2**31))

    def __post_init__(self) -> None:
        for f in fields(self):
            value, argparse_kwargs = getattr(self, f.name), f.metadata["argparse_kwargs"]
            choices = argparse_kwargs.get("choices")
            if choices and value not in choices:
                raise UserError(f"{flag(f.name)} {value}: choose from {', '.join(choices)}")
            if f.metadata["range"]:
                low, high = f.metadata["range"]
                numbers, count = value if isinstance(value, tuple) else (value,), argparse_kwargs.get("nargs", 1)
                kinds = int if type(f.default) is int else (int, float)
                if len(numbers) != count or not all(isinstance(n, kinds) and low <= n <= high for n in numbers):
                    what = f"{count} numbers" if count > 1 else "a whole number" if kinds is int else "a number"
                    span = f"from {low} to {high}" if high < math.inf else f"of {low} or more"
                    raise UserError(f"{flag(f.name)} {format_value(value)}: give {what} {span}")
        if self.folds == 1 or self.fold > self.folds:
            raise UserError(f"--folds {self.folds} --fold {self.fold}: give 2 folds or more, and one of them")
        if self.folds and self.val_size:
            raise UserError("--folds does not go with --val-size: each fold is held out in turn")


def flag(name: str) -> str:
    """The flag of the recipe's field `name`."""
    return "--" + name.replace("_", "-")


def format_value(value: Any) -> str:
    """A setting's value as typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The state of a training."""

    recipe: Recipe
    data_crc: int  # checksum of all training images, with the held-out ones
    loader: Loader  # the training images, and the last loss of each
    model: Net
    average: Net  # moving average of the model's weights, without dropout: it is measured and saved
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    dropout: dict[nn.Module, float]  # each dropout layer, and its rate in the first step
    history: list[dict[str, float]] = field(default_factory=list)  # an entry for each finished epoch


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train epoch number `epoch` (from 0) and return its entry of the history; UserError if the loss is not finite."""
    start, steps, epochs = time.perf_counter(), len(run.loader), run.recipe.epochs
    learning_rates = run.scheduler.get_last_lr()[:1]  # of the first parameter group, at the start and each check
    total_loss, correct = torch.zeros(2, device=run.loader.losses.device)
    seen = 0
    run.model.train()
    torch.manual_seed(utils.derive_seed(run.recipe.seed, epoch, utils.DROPOUT))
    run.loader.epoch = epoch
    bar = tqdm(
        run.loader, f"Epoch {epoch + 1}/{epochs}", epochs * steps, initial=epoch * steps, leave=False, disable=None,
        dynamic_ncols=True,
    )  # fmt: skip
    for step, (images, labels, index) in enumerate(bar, epoch * steps):
        set_dropout(run.dropout, dropout_factor(step / (epochs * steps), run.recipe.dropout_until))
        run.optimizer.zero_grad()
        logits = run.model(images)
        loss = run.loss_fn(logits, labels, images)
        loss.backward()
        run.optimizer.step()
        run.scheduler.step()
        update_average(run.average, run.model, step, run.recipe.ema_steps)

        run.loader.losses[index] = F.cross_entropy(logits.detach().float(), labels, reduction="none")
        total_loss += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if (step + 1) * CHECKS // steps > step * CHECKS // steps:  # evenly spaced; the last is after the last step
            mean_loss, accuracy = total_loss.item() / seen, correct.item() / seen
            learning_rates += run.scheduler.get_last_lr()[:1]
            if not math.isfinite(mean_loss):
                raise UserError(f"the loss is {mean_loss} in epoch {epoch + 1}; try a lower --peak-lr")
            bar.set_postfix(loss=f"{mean_loss:.4f}", accuracy=f"{accuracy:.2%}", refresh=False)
    return {
        "epoch": epoch + 1, "learning_rate": learning_rates[0], "learning_rates": learning_rates,
        "train_loss": mean_loss, "train_accuracy": accuracy, "seconds": time.perf_counter() - start,
    }  # fmt: skip


@torch.no_grad()
def update_average(average: Net, model: Net, step: int, length: float) -> None:
    """Move the weights of `average` towards those of `model`.

    The weight of step n is 1 / (1 + n / 10), but at least 1 / `length`: an average over the last tenth of the steps
    so far, or over `length` steps if that is less. Step 0 copies the weights.
    """
    weight = max(1 / length, 1 / (1 + step / 10))
    for ours, theirs in zip(average.parameters(), model.parameters()):
        ours.lerp_(theirs, weight)


def dropout_factor(progress: float, until: float) -> float:
    """The factor of all dropout rates at `progress` (0 to 1) of the run: it falls from 1 to 0 at `until`.

    Early dropout, after Liu et al., "Dropout Reduces Underfitting" (ICML 2023). With an `until` of 1 it stays 1.
    """
    if until in (0, 1):  # no dropout, or constant dropout
        return until
    return max(0.0, 1 - progress / until)


def dropout_rates(model: Net) -> dict[nn.Module, float]:
    """The dropout layers of `model`, of any kind, with their rates."""
    return {layer: layer.p for layer in model.modules() if isinstance(layer, DROPOUTS)}


def set_dropout(rates: dict[nn.Module, float], factor: float) -> None:
    """Set each layer's rate to `factor` times its rate in `rates`."""
    for layer, rate in rates.items():
        layer.p = rate * factor


def make_loss(recipe: Recipe, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of logits (B, 10), labels (B,) and images (B, 1, 28, 28): cross-entropy with the labels.

    With teachers it is a weighted mean of that and of the cross-entropy with the teachers' mean probabilities
    (distillation after Hinton et al., 2015, at temperature 1).
    """
    if not recipe.teacher:
        return lambda logits, labels, images: F.cross_entropy(logits, labels)
    teachers = []
    for path in recipe.teacher:
        teacher, checkpoint = utils.load_model(Path(path), device)
        teachers.append(teacher)
        if any(getattr(recipe, name) not in (0, checkpoint["recipe"][name]) for name in ("val_size", "folds", "fold")):
            utils.say("warning", f"{path} may know the images held out here: validation accuracy will be too high")

    def distillation_loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.stack([teacher(images).softmax(1) for teacher in teachers]).mean(0)
        return torch.lerp(F.cross_entropy(logits, labels), F.cross_entropy(logits, target), DISTILL_WEIGHT)

    return distillation_loss


# --- One run ----------------------------------------------------------------------------------------------------------


def train_once(args: argparse.Namespace, recipe: Recipe, last: Path | None) -> int:
    """Train from the beginning, or continue from the checkpoint `last`; returns the exit status."""
    torch.set_num_threads(recipe.threads)
    device, out = utils.choose_device(args.device), args.out
    everything = utils.load_mnist(args.data_dir, train=True, device=device)
    train_split, val_split = utils.make_splits(everything, *(getattr(recipe, name) for name in utils.SPLIT_SETTINGS))
    test_split = None if recipe.folds else utils.load_mnist(args.data_dir, train=False, device=device)
    if args.dry_run:
        few = slice(8 * recipe.batch_size)
        train_split, val_split, test_split = (s and s.select(few) for s in (train_split, val_split, test_split))
    run = build_run(recipe, train_split, zlib.crc32(everything.images.cpu().numpy()), device)
    if last:
        restore_state(run, last)
    announce(run, device, out)
    writer = open_writer(args.tensorboard / out.name, run) if args.tensorboard else None
    try:
        for epoch in range(len(run.history), recipe.epochs):
            entry = train_epoch(run, epoch)
            end_epoch(run, entry, val_split, out, writer)
    except KeyboardInterrupt:
        kept = "Finished epochs are kept; go on with --resume." if run.history and not args.dry_run else ""
        print(f"\nStopped. {kept}", file=sys.stderr)
        return 130
    finish(run, {"val": val_split, "test": test_split}, out, writer)
    return 0


def build_run(recipe: Recipe, split: Split, data_crc: int, device: torch.device) -> Run:
    """A run on the training images `split` before its first step."""
    torch.manual_seed(utils.derive_seed(recipe.seed, use=utils.WEIGHTS))
    model = utils.to_device(Net(**{name: getattr(recipe, name) for name in utils.ARCHITECTURE}), device)
    average = copy.deepcopy(model).requires_grad_(False)
    set_dropout(dropout_rates(average), 0)
    replacements = None
    if recipe.variants:
        from extras import variants

        replacements = variants.draw_variants(split, recipe.seed)
    if device.type == "cpu":
        from extras import shortcut

        shortcut.apply(model)
    augmentation = Augmentation(recipe.rotation, recipe.scale, recipe.translate, recipe.shear, recipe.elastic)
    loader = Loader(split, recipe.batch_size, augmentation, recipe.seed, recipe.hard_fraction, replacements)
    optimizer = utils.make_optimizer(model, recipe.lr, recipe.momentum, recipe.weight_decay)
    scheduler = utils.make_schedule(optimizer, recipe.lr, recipe.peak_lr, recipe.warmup, recipe.epochs * len(loader))
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UserError("make_schedule: ReduceLROnPlateau needs a metric, and there is none in a step")
    loss_fn = make_loss(recipe, device)
    return Run(recipe, data_crc, loader, model, average, loss_fn, optimizer, scheduler, dropout_rates(model))


def announce(run: Run, device: torch.device, out: Path) -> None:
    """Say what will be trained, and which runs it will replace."""
    done, epochs = len(run.history), run.recipe.epochs
    if done:
        print(f"Resuming {out} after epoch {done} of {epochs}" if done < epochs else f"{out} is finished", flush=True)
        return
    threads = f", {run.recipe.threads} thread" + "s" * (run.recipe.threads > 1) if device.type == "cpu" else ""
    count = len(run.loader.split.labels)
    print(f"Training {count_parameters(run.model):,} parameters on {count:,} images; {device}{threads}")
    for path in (out / "model.pt", out / "last.pt"):
        try:
            old = utils.load_checkpoint(path) if path.exists() else None
        except UserError:
            print(f"Replaces {path}, which is not a checkpoint of train.py")
            continue
        if old and path.name == "model.pt":
            accuracy = f", {old['metrics']['test_accuracy']:.2%}" if "test_accuracy" in old["metrics"] else ""
            print(f"Replaces {path} (seed {old['recipe']['seed']}, {len(old['history'])} epochs{accuracy})")
        elif old and len(old["history"]) < old["recipe"]["epochs"]:
            print(f"Replaces an unfinished run after epoch {len(old['history'])}; to go on with it, add --resume")
    hard = f", from epoch 2 on {run.recipe.hard_fraction:.0%} of them hard" * (run.recipe.hard_fraction > 0)
    print(f"Train loss and accuracy are of augmented images{hard}; on plain images both are better", flush=True)


def end_epoch(run: Run, entry: dict[str, float], val_split: Split | None, out: Path, writer: Any) -> None:
    """Measure the averaged network, add `entry` to the history, write last.pt and print the log."""
    for ours, theirs in zip(run.average.buffers(), run.model.buffers()):
        ours.copy_(theirs)  # update_bn measures BatchNorm's anew; this is for other layers
    # Batch statistics are measured on plain images: augmented images are blurred, and have others.
    plain = run.loader.split.images[::STATISTICS_EVERY]
    update_bn((images / 255 for images in plain.tensor_split(math.ceil(len(plain) / 500))), run.average)
    if val_split is not None:
        entry.update(measure_on("val", run.average, val_split))
    if not all(tensor.isfinite().all() for tensor in run.average.state_dict().values()):
        raise UserError(f"the weights are not finite after epoch {entry['epoch']}; try a lower --peak-lr")
    run.history.append(entry)
    save(run, out / "last.pt", metrics={}, training=training_state(run))
    print_epoch(entry)
    if writer:
        log_epoch(writer, entry)


def print_epoch(entry: dict[str, float]) -> None:
    """Print the log of one epoch in the specification's format."""
    print(f"Epoch {entry['epoch']}\nLearning rate: {entry['learning_rate']:.6f}")
    print(f"Train Loss: {entry['train_loss']:.4f} | Accuracy: {entry['train_accuracy']:.2%}")
    if "val_accuracy" in entry:
        print(f"Validation Loss: {entry['val_loss']:.4f} | Accuracy: {entry['val_accuracy']:.2%}")
    print(end="", flush=True)


def finish(run: Run, splits: dict[str, Split | None], out: Path, writer: Any) -> None:
    """Measure the "val" and "test" images that there are, with one look and with nine, and write model.pt."""
    metrics: dict[str, float] = {}
    for part, split in splits.items():
        if split:
            metrics.update(measure_on(part, run.average, split))
            metrics.update(measure_on(f"{part}_tta", run.average, split, tta=True))
    save(run, out / "model.pt", metrics=metrics)
    if writer:
        log_result(writer, run.recipe, metrics)
    part, name = ("test", "Test") if splits["test"] else ("val", "Validation")
    print(f"Final {name} Accuracy: {metrics[f'{part}_accuracy']:.2%}")
    minutes, seconds = divmod(round(sum(entry["seconds"] for entry in run.history)), 60)
    print(f"Trained in {minutes} min {seconds} s")


def measure_on(part: str, model: Net, split: Split, tta: bool = False) -> dict[str, float]:
    """Loss and accuracy of `model` on `split`, with `part` before their names: "val_loss", "val_accuracy"."""
    measured = utils.measure(utils.predict(model, split.images, tta), split.labels)
    return {f"{part}_{name}": value for name, value in measured.items()}


# --- Checkpoint and resume --------------------------------------------------------------------------------------------


def save(run: Run, path: Path, **contents: Any) -> None:
    """Write a checkpoint of the averaged network."""
    run_contents = {"recipe": asdict(run.recipe), "history": run.history, "data_crc": run.data_crc}
    utils.save_checkpoint(path, run.average, **run_contents, **contents)


def training_state(run: Run) -> dict[str, Any]:
    """What `restore_state` needs beside the averaged network."""
    return {
        "classes": [type(run.optimizer).__name__, type(run.scheduler).__name__],
        "weights": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "losses": run.loader.losses,
    }


def restore_state(run: Run, path: Path) -> None:
    """Put `run` where `end_epoch` wrote `path`; UserError if it was trained on other images or with other code."""
    checkpoint = utils.load_checkpoint(path)
    if checkpoint["data_crc"] != run.data_crc:
        raise UserError(f"{path} was trained on other images; give the --data-dir of that run, or another --out")
    try:
        state, expected = checkpoint["training"], training_state(run)
        if state["classes"] != expected["classes"]:
            raise ValueError(f"{' and '.join(state['classes'])}, not {' and '.join(expected['classes'])}")
        run.model.load_state_dict(state["weights"])
        run.average.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        run.loader.losses.copy_(state["losses"])
    except (KeyError, RuntimeError, ValueError) as error:
        why = utils.one_line(error)
        raise UserError(f"{path} is of another network, optimiser or schedule than the code's ({why})") from error
    run.history = checkpoint["history"]


def stored_recipe(path: Path) -> Recipe:
    """The recipe of a checkpoint; UserError if it is of another version of train.py."""
    stored = utils.load_checkpoint(path)["recipe"]
    try:
        return Recipe(**stored)
    except (TypeError, UserError) as error:
        raise UserError(
            f"{path} cannot be resumed, its recipe is of another version ({utils.one_line(error)})"
        ) from error


def check_same(recipe: Recipe, path: Path, settings: dict[str, Any]) -> None:
    """UserError if some of `settings` differ from `recipe`, which `path` holds."""
    others = {name: getattr(recipe, name) for name, value in settings.items() if value != getattr(recipe, name)}
    if others:
        given = " ".join(f"{flag(name)} {format_value(value) or 'none'}" for name, value in others.items())
        raise UserError(f"{path} was made with {given}: --resume cannot change that, nor the schedule that was made "
                        "for it; leave the flag out, or train anew into another --out")  # fmt: skip


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def open_writer(folder: Path, run: Run) -> Any:
    """A SummaryWriter for `folder`, with a batch of training images; UserError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    writer = SummaryWriter(str(folder), purge_step=len(run.history) + 1)  # hides later epochs of an earlier training
    writer.add_images("augmented digits", next(iter(run.loader))[0].clamp(0, 1))
    return writer


def log_epoch(writer: Any, entry: dict[str, float]) -> None:
    """Write an entry of the history. Training and validation share a chart for loss, and one for accuracy."""
    for name, value in entry.items():
        if name == "learning_rates":
            continue
        part, _, rest = name.partition("_")
        writer.add_scalar(f"{rest}/{part}" if part in ("train", "val") else name, value, entry["epoch"])


def log_result(writer: Any, recipe: Recipe, finals: dict[str, float]) -> None:
    """Write the hyperparameters with the final accuracies, and close the writer."""
    settings = {name: format_value(v) if isinstance(v, tuple) else v for name, v in asdict(recipe).items()}
    writer.add_hparams(settings, {f"final/{name}": value for name, value in finals.items()}, run_name=".")
    writer.close()


# --- Several runs -----------------------------------------------------------------------------------------------------


def run_several(args: argparse.Namespace, recipe: Recipe) -> int:
    """--runs or --folds: one process of this same command for each run, several at a time; then a summary."""
    from extras import several

    if recipe.folds:
        flags = {f"fold-{k}": ["--fold", k] for k in range(1, recipe.folds + 1)}
    else:
        flags = {f"seed-{k}": ["--runs", 1, "--seed", k] for k in range(recipe.seed, recipe.seed + args.runs)}
    folders = [args.out / name for name in flags]
    for last in (folder / "last.pt" for folder in folders):
        if args.resume and last.exists():
            settings = {name: value for name, value in asdict(recipe).items() if name not in ("seed", "fold")}
            check_same(stored_recipe(last), last, settings)
    tensorboard = ["--tensorboard", args.tensorboard / args.out.name] if args.tensorboard else []
    this_command = [sys.executable, __file__, *args.argv]  # of two equal flags the last one counts
    commands = {
        folder: list(map(str, [*this_command, *its_flags, "--out", folder, *tensorboard]))
        for folder, its_flags in zip(folders, flags.values())
    }
    device = utils.choose_device(args.device)
    jobs = args.jobs or (max(1, several.available_cores() // recipe.threads) if device.type == "cpu" else 1)
    try:
        failed = several.run_side_by_side(commands, jobs, recipe.epochs, "a" if args.resume else "w")
    except KeyboardInterrupt:
        print("\nStopped. Finished epochs are kept; the same command with --resume goes on.", file=sys.stderr)
        return 130
    if failed:
        raise UserError(f"{', '.join(failed)} failed; once the cause is mended, --resume goes on with the rest")
    several.summarize(args.out, folders, args.data_dir, device)
    return 0


# --- The command line -------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; `overrides` are its settings of the recipe."""
    parser = argparse.ArgumentParser(description="Train the network of model.py on MNIST.")
    recipe = parser.add_argument_group("recipe (saved in the checkpoint)")
    for f in fields(Recipe):
        kwargs = dict(f.metadata["argparse_kwargs"])
        if "action" not in kwargs:
            kwargs.setdefault("type", type(f.default))
        if f.metadata["range"] or f.name == "teacher":
            kwargs["metavar"] = "PATH" if f.name == "teacher" else kwargs["type"].__name__.upper()
        help = f"{f.metadata['help']} (default: {format_value(f.default) or 'none'})"
        recipe.add_argument(flag(f.name), default=argparse.SUPPRESS, help=help, **kwargs)
    utils.add_common_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("checkpoints"), metavar="DIR",
        help="folder of the checkpoints; of several runs also of their logs (default: %(default)s)")  # fmt: skip
    add("--resume", action="store_true", help="continue from last.pt in --out; start if there is none")
    add("--runs", type=positive, default=1, metavar="N", help="train N times, with consecutive seeds")
    add("--jobs", type=positive, metavar="J",
        help="processes for --runs or --folds (default: one for each core; on a GPU 1)")  # fmt: skip
    add("--tensorboard", type=Path, nargs="?", const=Path("runs"), metavar="DIR",
        help="write curves, images and hyperparameters for TensorBoard (default DIR: runs)")  # fmt: skip
    add("--dry-run", action="store_true", help="try everything with a few steps; keep nothing")
    args = parser.parse_args(argv)
    args.argv = argv
    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)}
    args.overrides = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "teacher" in given:
        runs = [run for path in args.teacher for run in utils.find_runs(Path(path))]
        args.overrides["teacher"] = tuple(str(run.resolve()) for run in runs)
    if args.runs > 1 and given.get("folds"):
        raise UserError("--runs does not go with --folds")
    return args


def launch(args: argparse.Namespace) -> int:
    """Start one run or several; returns the exit status."""
    from extras.several import locked

    several = args.runs > 1 or (args.overrides.get("folds") and not args.overrides.get("fold"))
    last = args.out / "last.pt"
    resumed = last if args.resume and last.exists() and not several else None
    if args.resume and not (several or resumed) and any(args.out.glob("*/last.pt")):
        raise UserError(f"{args.out} holds several runs: give one of its folders as --out, or repeat --runs or --folds")
    recipe = stored_recipe(last) if resumed else Recipe(**args.overrides)
    if resumed:
        check_same(recipe, last, args.overrides)
    written = [(args.out / name).resolve() for name in ("last.pt", "model.pt")]
    if any(Path(teacher) in written for teacher in recipe.teacher):
        raise UserError(f"--teacher: this run would overwrite its teacher in {args.out}; choose another --out")
    with locked(args.out):
        return run_several(args, recipe) if several else train_once(args, recipe, resumed)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if not args.dry_run:
        return launch(args)
    args.overrides["epochs"] = min(2, args.overrides.get("epochs", 2))
    args.runs = 1
    if args.overrides.get("folds"):
        args.overrides.setdefault("fold", 1)
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder) / "out"
        args.tensorboard = args.tensorboard and Path(folder) / "runs"
        status = launch(args)
    print("Dry run: a few steps on a few images. The accuracy means nothing, and nothing was kept.")
    return status


if __name__ == "__main__":
    utils.run_script(main)
