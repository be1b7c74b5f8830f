"""Train the network on MNIST: `python train.py`. All flags: `python train.py --help`."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import utils
from model import ACTIVATIONS, ADAPTIVE_POOLS, Net
from utils import Augmentation, Loader, Split, UserError, at_least

PLAIN_EVERY = 12  # the averaged network's normalisations are measured on one training image in so many
CHECK_EVERY = 50  # steps between two looks at the loss, each of which makes a GPU wait
TITLES = {"val_accuracy": "Validation Accuracy", "test_accuracy": "Test Accuracy"}


def main() -> int:
    args, given = parse_args()
    if not args.dry_run:
        return start(args, given)
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder) / "out"
        args.tensorboard = args.tensorboard and Path(folder) / "runs"
        return start(args, {**given, "epochs": min(2, given.get("epochs", 2))})


def start(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """One run or several, as the flags ask for; returns the exit status."""
    several = args.runs > 1 or (given.get("folds") and not given.get("fold"))
    last = args.out / "last.pt"
    resumed = last if args.resume and last.exists() and not several else None
    recipe = choose_recipe(given, resumed)
    with utils.locked(args.out):
        return run_several(args, recipe) if several else run_once(args, recipe, resumed)


# ---------------------------------------------------------------------------------------------------------------------
# The command line and the recipe


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and in a dict of its own what it says of the recipe."""
    parser = argparse.ArgumentParser(description="Train the 16,966-parameter CNN on MNIST.")
    recipe = parser.add_argument_group("recipe (saved in the checkpoint)")
    for f in fields(Recipe):
        rule = f.metadata
        recipe.add_argument(
            flag(f.name), type=rule["kind"], nargs=rule["nargs"], choices=rule["choices"],
            metavar=None if rule["choices"] else rule["kind"].__name__.upper(), default=argparse.SUPPRESS,
            help=f"{rule['help']} (default: {show(f.default) or 'none'})",
        )  # fmt: skip
    utils.add_common_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("checkpoints"), metavar="DIR", help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on from last.pt in --out, or start if there is none")
    add("--runs", type=at_least(1), default=1, metavar="N", help="train N times, with consecutive seeds")
    add("--jobs", type=at_least(1), metavar="J",
        help="of --runs or --folds, train J at a time (default: one a core; on a GPU 1)")  # fmt: skip
    add("--tensorboard", type=Path, nargs="?", const=Path("runs"), metavar="DIR",
        help="write curves, images and hyperparameters for TensorBoard (default DIR: runs)")  # fmt: skip
    add("--dry-run", action="store_true", help="a few steps of everything; keeps nothing")
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if args.runs > 1 and given.get("folds"):
        raise UserError("--runs does not go with --folds")
    return args, given


def choose_recipe(given: dict[str, Any], resumed: Path | None) -> Recipe:
    """The recipe with the flags `given`, or that of the checkpoint `resumed`; UserError if the two disagree."""
    if resumed is None:
        return Recipe(**given)
    checkpoint = utils.load_checkpoint(resumed)
    try:
        recipe = Recipe(**checkpoint["recipe"])
    except (TypeError, UserError) as error:
        raise UserError(f"{resumed} cannot be resumed, its recipe is damaged or of another version: {error}") from error
    for name, value in given.items():
        stored = getattr(recipe, name)
        if stored != value:
            raise UserError(
                f"{flag(name)} {show(value)}: {resumed} was made with {show(stored)}, and --resume keeps it"
            )
    return recipe


def setting(
    default: Any, help: str, low: float = 0, high: float = math.inf, *, kind: type | None = None,
    nargs: int | str | None = None, choices: tuple | None = None,
) -> Any:  # fmt: skip
    """A field of the recipe: its default, what --help says of it, its range, and argparse's words for the rest."""
    rule = {"help": help, "low": low, "high": high, "kind": kind or type(default), "nargs": nargs, "choices": choices}
    return field(default=default, metadata=rule)


@dataclass(frozen=True)
class Recipe:
    """All that a trained network depends on beside the data: train.py's flags, and what a checkpoint stores.

    Raises UserError for a value out of range, whether it comes from a flag or from a file.
    """

    epochs: int = setting(20, "passes over the training images", 1, 100_000)
    batch_size: int = setting(64, "images in a step", 2, 65_536)
    lr: float = setting(0.015, "learning rate of the first step", 1e-12, 1e6)
    peak_lr: float = setting(0.15, "highest learning rate of the cycle", 1e-12, 1e6)
    warmup: float = setting(0.2, "fraction of the run that rises to it", 0, 1)
    momentum: float = setting(0.9, "Nesterov momentum", 0, 0.9999)
    weight_decay: float = setting(1e-4, "L2 penalty", 0, 1)
    ema: float = setting(2500.0, "steps of the moving average of the weights that is saved; 1 for the last step's", 1)
    dropout: tuple = setting(
        (0.1, 0.2, 0.3, 0.4), "dropout rates of the four blocks at the start", 0, 0.95, kind=float, nargs=4
    )
    fc_dropout: float = setting(0.4, "dropout rate between the linear layers at the start", 0, 0.95)
    dropout_until: float = setting(
        0.1, "fraction of the run in which all dropout rates fall linearly to 0; 1 keeps them constant", 0, 1
    )
    rotation: float = setting(10.0, "augmentation: degrees, either way", 0, 180)
    scale: float = setting(0.1, "augmentation: 0.1 is 0.9 to 1.1", 0, 0.9)
    translate: float = setting(0.05, "augmentation: fraction of the side, either way", 0, 1)
    shear: float = setting(10.0, "augmentation: degrees, either way", 0, 60)
    elastic: float = setting(
        0.35, "augmentation: elastic distortion, standard deviation in pixels of a coarse grid's points", 0, 10
    )
    foreign: float = setting(
        0.25, "share of the ones, sevens and nines that get a flag, a bar or a tail, as much of the world writes them;"
        " without this flag only where the training images are MNIST's own", 0, 1,
    )  # fmt: skip
    width: int = setting(1, "times as many channels: a teacher", 1, utils.MAX_WIDTH)
    activation: str = setting("silu", "of the blocks and of the first linear layer", choices=tuple(ACTIVATIONS))
    adaptive_pool: str = setting("max", "between the blocks and the linear layers", choices=tuple(ADAPTIVE_POOLS))
    teacher: tuple = setting(
        (), "checkpoints whose mean prediction the network also learns from (distillation)", kind=str, nargs="+"
    )
    temperature: float = setting(1.0, "of the distillation", 1e-3, 1e3)
    distill_weight: float = setting(0.7, "of the teachers in the loss", 0, 1)
    val_size: int = setting(0, "hold out so many training images, stratified, and report on them each epoch")
    folds: int = setting(0, "cross-validation with so many stratified folds of the training images")
    fold: int = setting(0, "with --folds, hold out only fold number 1 to FOLDS")
    threads: int = setting(
        1, "CPU threads; a second one may help on a quiet machine, and makes it several times slower on a busy one;"
        " the bits of the result depend on them", 1, 1024,
    )  # fmt: skip
    seed: int = setting(0, "of weights, order, augmentation and dropout", 0, 2**31)

    @property
    def augmentation(self) -> Augmentation:
        """The five ranges, as `Loader` takes them."""
        return Augmentation(self.rotation, self.scale, self.translate, self.shear, self.elastic)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata
            values = value if isinstance(value, tuple) else (value,)
            typed = type(value) is type(f.default) and all(type(v) is rule["kind"] for v in values)
            if not typed or rule["nargs"] not in (None, "+", len(values)):
                kind = type(value).__name__
                raise UserError(f"{flag(f.name)} is a {kind}, and not a value like {f.default!r}")
            if rule["choices"] and value not in rule["choices"]:
                raise UserError(f"{flag(f.name)} {value}: choose from {', '.join(rule['choices'])}")
            if rule["kind"] is not str and not all(rule["low"] <= v <= rule["high"] for v in values):
                raise UserError(f"{flag(f.name)} {show(value)} is not from {rule['low']} to {rule['high']}")
        if self.lr > self.peak_lr:
            raise UserError(f"--lr {self.lr} is above --peak-lr {self.peak_lr}: the cycle rises from one to the other")
        if self.folds == 1 or self.fold > self.folds:
            raise UserError(f"--folds {self.folds} --fold {self.fold}: there must be 2 folds or more, counted from 1")
        if self.folds and self.val_size:
            raise UserError("--folds does not go with --val-size: each fold is held out in its turn")


def flag(name: str) -> str:
    """The flag of the recipe's field `name`."""
    return "--" + name.replace("_", "-")


def show(value: Any) -> str:
    """A setting's value as one types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run_once(args: argparse.Namespace, recipe: Recipe, resumed: Path | None) -> int:
    """Train as the recipe says, then read the test set once (a fold: not at all), then write model.pt."""
    torch.set_num_threads(recipe.threads)
    device, out = utils.choose_device(args.device), args.out
    written = [(out / name).resolve() for name in ("last.pt", "model.pt")]
    if any(Path(teacher).resolve() in written for teacher in recipe.teacher):
        raise UserError(f"--teacher: this run would overwrite its teacher in {out}; choose another --out")
    everything = utils.load_mnist(args.data_dir, train=True, device=device)
    data_crc = zlib.crc32(everything.images.cpu().numpy())
    typed = hasattr(args, "foreign")  # of the recipe's flags, `args` has only those
    if not (resumed or typed) and data_crc != utils.MNIST_CRC32:
        recipe = replace(recipe, foreign=0.0)
    train_split, val_split = split_off(everything, recipe)
    train_split = utils.draw_foreign_shapes(train_split, recipe.foreign, recipe.seed)
    test_split = None if recipe.folds else utils.load_mnist(args.data_dir, train=False, device=device)
    if args.dry_run:
        few = slice(8 * recipe.batch_size)
        train_split, val_split, test_split = (s and s.select(few) for s in (train_split, val_split, test_split))

    run = begin(recipe, device, data_crc)
    if resumed:
        restore_state(run, recipe, resumed)
        utils.write_json(out / "history.json", run.history)  # a kill may have come between the two files
        done = len(run.history)
        print(f"Resuming {out} after epoch {done} of {recipe.epochs}" if done < recipe.epochs else f"{out} is finished")
    board = open_board(args.tensorboard / out.name, run.history) if args.tensorboard else None
    try:
        train(run, recipe, train_split, val_split, out, board)
    except KeyboardInterrupt:
        kept = "Finished epochs are kept; go on with --resume." if run.history and not args.dry_run else ""
        print(f"\nStopped. {kept}", file=sys.stderr)
        return 130
    finish(run, recipe, test_split, out, board)
    return 0


def split_off(everything: Split, recipe: Recipe) -> tuple[Split, Split | None]:
    """The images to train on, and those that the recipe holds out, if any."""
    if max(recipe.val_size, 10 * recipe.folds) >= len(everything.labels):
        raise UserError(f"--val-size or --folds leave too few of {len(everything.labels):,} images to train on")
    if recipe.folds:
        return utils.fold_out(everything, recipe.folds, recipe.fold)
    if recipe.val_size:
        return utils.hold_out(everything, recipe.val_size)
    return everything, None


@dataclass
class Run:
    """The state of a run, as last.pt holds it; each epoch seeds its own random numbers."""

    model: Net
    average: utils.WeightAverage
    optimizer: torch.optim.SGD
    history: list[dict[str, float]]
    data_crc: int  # CRC32 of all training images, held out or not

    def momentum(self) -> dict[str, Tensor]:
        """The optimiser's momentum, by the names of the weights."""
        return {name: self.optimizer.state[p]["momentum_buffer"] for name, p in self.model.named_parameters()}


def begin(recipe: Recipe, device: torch.device, data_crc: int) -> Run:
    """A run before its first step."""
    torch.manual_seed(utils.derive_seed(recipe.seed, use=utils.WEIGHTS))
    model = Net(recipe.width, recipe.activation, recipe.adaptive_pool, recipe.dropout, recipe.fc_dropout)
    model = utils.place(model, device)
    average = utils.WeightAverage(model, recipe.ema)
    optimizer = utils.make_optimizer(model, recipe.lr, recipe.momentum, recipe.weight_decay)
    return Run(model, average, optimizer, [], data_crc)


def train(run: Run, recipe: Recipe, train_split: Split, val_split: Split | None, out: Path, board: Any) -> None:
    """Train the rest of the run's epochs; after each, write last.pt and history.json and print its log."""
    device = train_split.labels.device
    train_loader = Loader(train_split, recipe.batch_size, recipe.augmentation, recipe.seed)
    plain_loader = Loader(train_split.select(slice(None, None, PLAIN_EVERY)), batch_size=500)
    loss_fn = make_loss(recipe, device)
    if board:
        board.add_images("augmented digits", (next(iter(train_loader))[0] * utils.STD).clamp(0, 1))
    for epoch in range(len(run.history), recipe.epochs):
        entry = train_epoch(run, train_loader, loss_fn, recipe, epoch)
        update_bn(plain_loader, run.average.model)  # digits to be read are not augmented: their statistics differ
        if val_split is not None:
            entry.update(utils.scores("val", utils.predict(run.average.model, val_split), val_split.labels))
        if not all(tensor.isfinite().all() for tensor in run.average.model.state_dict().values()):
            raise UserError(f"the weights are not finite after epoch {epoch + 1}; try a lower --peak-lr")
        run.history.append(entry)
        save_state(run, recipe, out / "last.pt")
        utils.write_json(out / "history.json", run.history)
        print_epoch(entry)
        if board:
            log_epoch(board, entry)


def train_epoch(run: Run, train_loader: Loader, loss_fn: Callable, recipe: Recipe, epoch: int) -> dict[str, float]:
    """Train epoch number `epoch` (from 0) and say how it went; UserError if the loss stops being finite."""
    start, steps = time.perf_counter(), len(train_loader)
    run.model.train()
    torch.manual_seed(utils.derive_seed(recipe.seed, epoch, utils.DROPOUT))
    train_loader.set_epoch(epoch)
    total_loss, correct = torch.zeros(2, device=train_loader.split.labels.device)
    seen = 0
    bar = tqdm(train_loader, f"Epoch {epoch + 1}/{recipe.epochs}", leave=False, disable=None, dynamic_ncols=True)
    for step, (images, labels) in enumerate(bar, 1):
        done = epoch * steps + step - 1
        run.optimizer.param_groups[0]["lr"] = learning_rate(done, steps, recipe)
        run.model.scale_dropout(dropout_factor(done / (recipe.epochs * steps), recipe.dropout_until))
        run.optimizer.zero_grad()
        logits = run.model(images)
        loss = loss_fn(logits, labels, images)
        loss.backward()
        run.optimizer.step()
        run.average.update(run.model)

        total_loss += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if step % CHECK_EVERY == 0 or step == steps:
            mean_loss, accuracy = total_loss.item() / seen, 100 * correct.item() / seen
            if not math.isfinite(mean_loss):
                raise UserError(f"the loss is {mean_loss} in epoch {epoch + 1}; try a lower --peak-lr")
            bar.set_postfix(loss=f"{mean_loss:.4f}", accuracy=f"{accuracy:.2f}%", refresh=False)
    return {
        "epoch": epoch + 1, "learning_rate": learning_rate(epoch * steps, steps, recipe),
        "dropout_factor": dropout_factor(epoch / recipe.epochs, recipe.dropout_until),
        "train_loss": mean_loss, "train_accuracy": accuracy, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def learning_rate(step: int, steps_an_epoch: int, recipe: Recipe) -> float:
    """Learning rate of step number `step` (from 0) of the run."""
    return utils.one_cycle(step, recipe.epochs * steps_an_epoch, recipe.lr, recipe.peak_lr, recipe.warmup)


def dropout_factor(progress: float, until: float) -> float:
    """What all dropout rates are multiplied by at `progress` (0 to 1) of the run: 1 falling to 0 at `until`.

    Early dropout, after Liu et al., "Dropout Reduces Underfitting" (ICML 2023); an `until` of 1 keeps it at 1.
    """
    if until in (0, 1):
        return until
    return max(0.0, 1 - progress / until)


def make_loss(recipe: Recipe, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """loss_fn(logits (B, 10), labels (B,), images (B, 1, 28, 28)) of the recipe.

    With teachers, after Hinton et al. (2015): cross-entropy with the labels and, by `distill_weight`, with the
    teachers' softened mean, times temperature squared, which keeps the size of its gradient.
    """
    if not recipe.teacher:
        return lambda logits, labels, images: F.cross_entropy(logits, labels)
    teachers = []
    for path in recipe.teacher:
        teacher, checkpoint = utils.load_model(Path(path), device)
        teachers.append(teacher)
        held_out = ("val_size", "folds", "fold")
        if any(getattr(recipe, name) not in (0, checkpoint["recipe"].get(name)) for name in held_out):
            utils.warn(f"{path} may have been trained on images that are held out here: validation will look too good")

    def distillation_loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.stack([F.softmax(teacher(images) / recipe.temperature, 1) for teacher in teachers]).mean(0)
        soft = F.cross_entropy(logits / recipe.temperature, target) * recipe.temperature**2
        return torch.lerp(F.cross_entropy(logits, labels), soft, recipe.distill_weight)

    return distillation_loss


def print_epoch(entry: dict[str, float]) -> None:
    """The log lines of one epoch, in the specification's format."""
    print(f"Epoch {entry['epoch']}\nLearning rate: {entry['learning_rate']:.6f}")
    print(f"Train Loss: {entry['train_loss']:.4f} | Accuracy: {entry['train_accuracy']:.2f}%")
    if "val_accuracy" in entry:
        print(f"Validation Loss: {entry['val_loss']:.4f} | Accuracy: {entry['val_accuracy']:.2f}%")
    sys.stdout.flush()


def finish(run: Run, recipe: Recipe, test_split: Split | None, out: Path, board: Any) -> None:
    """Read the test set, write model.pt and print the final accuracy; of a fold, that of the held-out images."""
    metrics = last_metrics(run.history)
    if test_split is not None:
        logits = utils.predict(run.average.model, test_split)
        metrics.update(utils.scores("test", logits, test_split.labels))
        misread = test_split.images[logits.argmax(1) != test_split.labels]
        if board and len(misread):
            board.add_images("misclassified digits", misread[:64])
    path = out / "model.pt"
    utils.save_checkpoint(path, run.average.model, recipe=asdict(recipe), epoch=recipe.epochs, metrics=metrics)
    if board:
        log_result(board, recipe, metrics)
    final = "val_accuracy" if test_split is None else "test_accuracy"
    print(f"Final {TITLES[final]}: {metrics[final]:.2f}%")


def last_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """Losses and accuracies of the last epoch."""
    return {name: value for name, value in history[-1].items() if name.startswith(("train_", "val_"))}


def save_state(run: Run, recipe: Recipe, path: Path) -> None:
    """Write all that the run needs to go on: a checkpoint of the averaged network with a part "training"."""
    training = {
        "weights": run.model.state_dict(),
        "momentum": run.momentum(),
        "updates": run.average.count,
        "history": run.history,
        "data_crc": run.data_crc,
    }
    contents = {"recipe": asdict(recipe), "epoch": len(run.history), "metrics": last_metrics(run.history)}
    utils.save_checkpoint(path, run.average.model, **contents, training=training)


def restore_state(run: Run, recipe: Recipe, path: Path) -> None:
    """Take up what `save_state` wrote to `path`; UserError if it is damaged or has learnt from other images."""
    checkpoint = utils.load_checkpoint(path)
    try:
        state = checkpoint["training"]
        utils.load_tensors(run.model.state_dict(), state["weights"])
        utils.load_tensors(run.average.model.state_dict(), checkpoint["model"])
        utils.load_tensors(run.momentum(), state["momentum"])
        run.average.count, trained_on = int(state["updates"]), int(state["data_crc"])
        run.history = [dict(entry) for entry in state["history"]]
        numbers = all(type(value) in (int, float) for entry in run.history for value in entry.values())
        if not (numbers and last_metrics(run.history) and len(run.history) == checkpoint["epoch"] <= recipe.epochs):
            raise ValueError("history")
    except Exception as error:  # a spoilt state makes PyTorch raise nearly anything
        raise UserError(f"{path} is of another network than this model.py, or damaged ({error!r:.200})") from error
    if trained_on != run.data_crc:
        raise UserError(f"{path} was trained on other images; give the --data-dir of that run, or another --out")


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


def open_board(folder: Path, history: list[dict[str, float]]) -> Any:
    """A SummaryWriter for `folder` with the epochs so far; UserError if package or right to write is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    try:
        board = SummaryWriter(str(folder))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    for entry in history:  # of a resumed run, which may have had no board before
        log_epoch(board, entry)
    return board


def log_epoch(board: Any, entry: dict[str, float]) -> None:
    """What `history.json` has of the epoch; loss and accuracy of training and validation share a chart."""
    for name, value in entry.items():
        part, _, rest = name.partition("_")
        board.add_scalar(f"{rest}/{part}" if part in ("train", "val") else name, value, entry["epoch"])


def log_result(board: Any, recipe: Recipe, metrics: dict[str, float]) -> None:
    """The hyperparameters with the final accuracy."""
    settings = {name: show(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}
    finals = {f"final/{name}": value for name, value in metrics.items() if name.endswith("accuracy")}
    board.add_hparams(settings, finals, run_name=".")
    board.close()


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


def run_several(args: argparse.Namespace, recipe: Recipe) -> int:
    """--runs or --folds: a process of this same command for each, some at a time, and a report on all of them."""
    if recipe.folds:
        parts = {args.out / f"fold-{k}": ["--fold", k] for k in range(1, recipe.folds + 1)}
    else:
        seeds = range(recipe.seed, recipe.seed + args.runs)
        parts = {args.out / f"seed-{seed}": ["--runs", 1, "--seed", seed] for seed in seeds}
    board = ["--tensorboard", args.tensorboard / args.out.name] if args.tensorboard else []
    same = [sys.executable, __file__, *sys.argv[1:]]  # of two equal flags the last one counts
    commands = {folder: [*same, *map(str, [*words, "--out", folder, *board])] for folder, words in parts.items()}
    device = utils.choose_device(args.device)
    jobs = args.jobs or (max(1, available_cores() // recipe.threads) if device.type == "cpu" else 1)
    try:
        failed = run_side_by_side(commands, jobs, recipe.epochs, "a" if args.resume else "w")
    except KeyboardInterrupt:
        print("\nStopped. What was finished is kept; the same command with --resume goes on.", file=sys.stderr)
        return 130
    if failed:
        raise UserError(f"{', '.join(failed)} failed; the same command with --resume goes on with the rest")
    if not args.dry_run:
        report(args, [*parts], device)
    return 0


def run_side_by_side(commands: dict[Path, list[str]], jobs: int, epochs: int, mode: str) -> list[str]:
    """Run the command of each folder, `jobs` at a time, its output going to the folder's log.txt, under one bar.

    Returns the names of the folders whose command failed. What still runs ends when this is interrupted.
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
    """What the process of `folder` has printed so far."""
    return (folder / "log.txt").read_text(errors="replace")


def available_cores() -> int:
    """Cores that this process may use: its affinity, or less where a container has a quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    quota, period = quota_file.read_text().split() if quota_file.exists() else ("max", "1")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def report(args: argparse.Namespace, folders: list[Path], device: torch.device) -> None:
    """Table and summary of the runs in `folders`, and for seeds the accuracy of their ensemble; also to runs.json."""
    models, checkpoints = zip(*(utils.load_model(folder / "model.pt", device) for folder in folders))
    recipes = [{**c["recipe"], "seed": None, "fold": None} for c in checkpoints]
    for folder, recipe in zip(folders, recipes):
        if recipe != recipes[0]:
            raise UserError(f"{folder} and {folders[0]} were trained by different recipes: no common figure")
    columns = [name for name in TITLES if name in checkpoints[0]["metrics"]]
    runs = [{"run": folder.name, **c["metrics"]} for folder, c in zip(folders, checkpoints)]
    results: dict[str, Any] = {"recipe": checkpoints[0]["recipe"], "versions": utils.versions(), "runs": runs}

    print(f"\n{'Run':<8}" + "".join(f"{TITLES[name]:>22}" for name in columns))
    for run in runs:
        print(f"{run['run']:<8}" + "".join(f"{run[name]:21.2f}%" for name in columns))
    for name in columns:
        results[name] = summary([run[name] for run in runs])
        print(f"{TITLES[name]}: " + "mean {mean:.3f}%  std {std:.3f}  standard error {sem:.3f}  min {min:.2f}%  "
              "max {max:.2f}%  ({n} runs)".format(**results[name]))  # fmt: skip
    if "test_accuracy" in columns:
        test_split = utils.load_mnist(args.data_dir, train=False, device=device)
        ensemble = torch.stack([utils.predict(model, test_split).softmax(1) for model in models]).mean(0)
        results["ensemble_test_accuracy"] = utils.accuracy(ensemble, test_split.labels)
        print(f"Test Accuracy of the {len(runs)} networks' mean prediction: {results['ensemble_test_accuracy']:.2f}%")
    utils.write_json(args.out / "runs.json", results)


def summary(values: list[float]) -> dict[str, float]:
    """Mean, sample standard deviation, standard error of the mean, minimum, maximum and number of `values`."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "sem": std / len(values) ** 0.5,
            "min": min(values), "max": max(values), "n": len(values)}  # fmt: skip


if __name__ == "__main__":
    utils.run_script(main)
