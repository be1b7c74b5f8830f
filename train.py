"""Train the network on MNIST: `python train.py`. All flags: `python train.py --help`."""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import utils
from model import ACTIVATIONS, ADAPTIVE_POOLS, IMAGE_SIZE, MAX_WIDTH, Net, count_parameters
from utils import Augmentation, Loader, Split, UserError, at_least

try:
    import fcntl
except ImportError:  # Windows: two trainings into one --out are not refused there
    fcntl = None

PLAIN_EVERY = 12  # one in 12 training images measures the averaged network's normalisation
CHECK_EVERY = 50  # steps between two looks at the loss, each of which makes a GPU wait
TITLES = {"val_accuracy": "Validation Accuracy", "test_accuracy": "Test Accuracy"}


def setting(default: Any, help: str, low: float = 0, high: float = math.inf, **argparse_words: Any) -> Any:
    """A field of the recipe: its default, what --help says of it, its range, and what else its flag needs."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "words": argparse_words})


@dataclass(frozen=True)
class Recipe:
    """All that a trained network depends on beside the data: train.py's flags, and what a checkpoint stores.

    Raises UserError for a value out of range, whether it comes from a flag or from a file.
    """

    epochs: int = setting(20, "images to show, in multiples of the training images", 1, 100_000)
    batch_size: int = setting(64, "images in a step", 2, 65_536)
    lr: float = setting(0.015, "learning rate of the first step", 1e-12, 1e6)
    peak_lr: float = setting(0.15, "highest learning rate of the cycle", 1e-12, 1e6)
    warmup: float = setting(0.2, "fraction of the run that rises to it", 0, 1)
    momentum: float = setting(0.9, "Nesterov momentum", 0, 0.9999)
    weight_decay: float = setting(1e-4, "L2 penalty", 0, 1)
    ema: float = setting(2500.0, "steps of the moving average of the weights that is saved; 1 for the last step's", 1)
    dropout: tuple = setting((0.1, 0.2, 0.3, 0.4), "rates of the blocks at the start", 0, 0.95, type=float, nargs=4)
    fc_dropout: float = setting(0.4, "dropout rate between the linear layers at the start", 0, 0.95)
    dropout_until: float = setting(0.1, "fraction of the run in which dropout falls to 0; 1 keeps it constant", 0, 1)
    rotation: float = setting(10.0, "augmentation: degrees, either way", 0, 180)
    scale: float = setting(0.1, "augmentation: 0.1 is 0.9 to 1.1", 0, 0.9)
    translate: float = setting(0.05, "augmentation: fraction of the side, either way", 0, 1)
    shear: float = setting(10.0, "augmentation: degrees, either way", 0, 60)
    elastic: float = setting(0.35, "augmentation: standard deviation, in pixels, of elastic distortion", 0, 10)
    variants: float = setting(1.0, "factor of how often 0, 1, 7, 9 get a slash, flag, bar, tail; other data: 0", 0, 4)
    width: int = setting(1, "factor of all hidden layers' widths; wide networks are teachers", 1, MAX_WIDTH)
    activation: str = setting("silu", "activation of blocks and first linear layer", choices=tuple(ACTIVATIONS))
    adaptive_pool: str = setting("max", "pooling behind the blocks", choices=tuple(ADAPTIVE_POOLS))
    teacher: tuple = setting((), "checkpoints, or folders of runs, to learn from as well (distillation)", nargs="+")
    temperature: float = setting(1.0, "temperature of the distillation", 1e-3, 1e3)
    distill_weight: float = setting(0.7, "weight of the teachers in the loss", 0, 1)
    val_size: int = setting(0, "training images to hold out, stratified, and to report on each epoch")
    folds: int = setting(0, "number of stratified folds of the training images for cross-validation")
    fold: int = setting(0, "the one fold to hold out, 1 to FOLDS; 0 holds out each in its turn")
    threads: int = setting(1, "CPU threads; with two a busy machine is several times slower, and bits differ", 1, 1024)
    seed: int = setting(0, "seed of weights, order, augmentation, variants and dropout", 0, 2**31)

    @property
    def augmentation(self) -> Augmentation:
        """What happens to training images, as `Loader` takes them."""
        return Augmentation(self.rotation, self.scale, self.translate, self.shear, self.elastic, self.variants)

    def __post_init__(self) -> None:
        check_recipe(self)


# ---------------------------------------------------------------------------------------------------------------------
# One run


@dataclass
class Run:
    """The state of a run; each epoch seeds its own random numbers."""

    recipe: Recipe
    data_crc: int  # CRC32 of all training images, held out or not
    model: Net
    average: Net  # moving average of the model's weights, without dropout: what is measured and saved
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    dropout: dict[torch.nn.Module, float]  # each dropout layer, and its rate at the start
    loader: Loader  # the training images, and the loss that each last had
    history: list[dict[str, float]]


def train_once(args: argparse.Namespace, recipe: Recipe, last: Path | None) -> int:
    """One run, from its beginning or on from the checkpoint `last`; returns the exit status."""
    torch.set_num_threads(recipe.threads)
    device, out = utils.choose_device(args.device), args.out
    everything = utils.load_mnist(args.data_dir, train=True, device=device)
    data_crc = utils.crc32(everything)
    if "variants" not in args.overrides and not last and data_crc != utils.MNIST_CRC32:
        recipe = replace(recipe, variants=0.0)
    train_split, val_split = utils.make_splits(everything, recipe.val_size, recipe.folds, recipe.fold)
    test_split = None if recipe.folds else utils.load_mnist(args.data_dir, train=False, device=device)
    if args.dry_run:
        few = slice(8 * recipe.batch_size)
        train_split, val_split, test_split = (s and s.select(few) for s in (train_split, val_split, test_split))
    train_loader = Loader(train_split, recipe.batch_size, recipe.augmentation, recipe.seed)
    loss_fn = make_loss(recipe, device)

    run = build_run(recipe, device, data_crc, train_loader)
    if last:
        restore_state(run, last)
    announce(run, len(train_split.labels), device, out)
    board = open_board(args.tensorboard / out.name, run.history) if args.tensorboard else None
    if board:
        board.add_images("augmented digits", next(iter(train_loader))[0].clamp(0, 1))
    try:
        for epoch in range(len(run.history), recipe.epochs):
            entry = train_epoch(run, loss_fn, epoch)
            end_epoch(run, entry, val_split, out, board)
    except KeyboardInterrupt:
        kept = "Finished epochs are kept; go on with --resume." if run.history and not args.dry_run else ""
        print(f"\nStopped. {kept}", file=sys.stderr)
        return 130
    finish(run, test_split, out, board)
    return 0


def build_run(recipe: Recipe, device: torch.device, data_crc: int, loader: Loader) -> Run:
    """A run on the images of `loader` before its first step."""
    torch.manual_seed(utils.derive_seed(recipe.seed, use=utils.WEIGHTS))
    model = Net(recipe.width, recipe.activation, recipe.adaptive_pool, recipe.dropout, recipe.fc_dropout)
    model = utils.to_device(model, device)
    average = copy.deepcopy(model).requires_grad_(False)
    set_dropout(dropout_rates(average), 0)
    optimizer = utils.make_optimizer(model, recipe.lr, recipe.momentum, recipe.weight_decay)
    scheduler = utils.make_schedule(optimizer, recipe.lr, recipe.peak_lr, recipe.warmup, recipe.epochs * len(loader))
    return Run(recipe, data_crc, model, average, optimizer, scheduler, dropout_rates(model), loader, history=[])


def train_epoch(run: Run, loss_fn: Callable, epoch: int) -> dict[str, float]:
    """Train epoch number `epoch` (from 0) and say how it went; UserError if the loss stops being finite."""
    start, steps, epochs = time.perf_counter(), len(run.loader), run.recipe.epochs
    learning_rate = run.scheduler.get_last_lr()[0]
    run.model.train()
    torch.manual_seed(utils.derive_seed(run.recipe.seed, epoch, utils.DROPOUT))
    run.loader.set_epoch(epoch)
    total_loss, correct = torch.zeros(2, device=run.loader.losses.device)
    seen = 0
    bar = tqdm(run.loader, f"Epoch {epoch + 1}/{epochs}", leave=False, disable=None, dynamic_ncols=True)
    for step, (images, labels, index) in enumerate(bar, epoch * steps):
        set_dropout(run.dropout, dropout_factor(step / (epochs * steps), run.recipe.dropout_until))
        run.optimizer.zero_grad()
        logits = run.model(images)
        loss = loss_fn(logits, labels, images)
        loss.backward()
        run.optimizer.step()
        run.scheduler.step()
        update_average(run.average, run.model, step, run.recipe.ema)

        run.loader.losses[index] = F.cross_entropy(logits.detach(), labels, reduction="none")
        total_loss += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == (epoch + 1) * steps:
            mean_loss, accuracy = total_loss.item() / seen, 100 * correct.item() / seen
            if not math.isfinite(mean_loss):
                raise UserError(f"the loss is {mean_loss} in epoch {epoch + 1}; try a lower --peak-lr")
            bar.set_postfix(loss=f"{mean_loss:.4f}", accuracy=f"{accuracy:.2f}%", refresh=False)
    return {
        "epoch": epoch + 1, "learning_rate": learning_rate,
        "dropout_factor": dropout_factor(epoch / epochs, run.recipe.dropout_until),
        "train_loss": mean_loss, "train_accuracy": accuracy, "seconds": time.perf_counter() - start,
    }  # fmt: skip


@torch.no_grad()
def update_average(average: Net, model: Net, step: int, length: float) -> None:
    """Move the weights of `average` towards those of `model`, for a moving average over about `length` steps.

    Step 0 copies them; step n weighs 1 / (1 + n / 10), until that falls to 1 / `length`.
    """
    weight = max(1 / length, 1 / (1 + step / 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


def dropout_factor(progress: float, until: float) -> float:
    """What all dropout rates are multiplied by at `progress` (0 to 1) of the run: 1 falling to 0 at `until`.

    Early dropout, after Liu et al., "Dropout Reduces Underfitting" (ICML 2023); an `until` of 1 keeps it at 1.
    """
    if until in (0, 1):
        return until
    return max(0.0, 1 - progress / until)


def dropout_rates(model: Net) -> dict[torch.nn.Module, float]:
    """The dropout layers of `model`, of any kind, with their rates."""
    return {layer: layer.p for layer in model.modules() if isinstance(layer, _DropoutNd)}


def set_dropout(rates: dict[torch.nn.Module, float], factor: float) -> None:
    """Let each layer drop at `factor` times its rate."""
    for layer, rate in rates.items():
        layer.p = rate * factor


def make_loss(recipe: Recipe, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """loss_fn(logits (B, 10), labels (B,), images (B, 1, 28, 28)) of the recipe: cross-entropy.

    With teachers, after Hinton et al. (2015): cross-entropy with the labels and, by `distill_weight`, with the
    teachers' softened mean, times temperature squared, which keeps the size of its gradient.
    """
    if not recipe.teacher:
        return lambda logits, labels, images: F.cross_entropy(logits, labels)
    teachers = []
    for path in recipe.teacher:
        teacher, checkpoint = utils.load_model(Path(path), device)
        teachers.append(teacher)
        if any(getattr(recipe, name) not in (0, checkpoint["recipe"][name]) for name in ("val_size", "folds", "fold")):
            utils.warn(f"{path} may have been trained on images that are held out here: validation will look too good")

    def distillation_loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.stack([F.softmax(teacher(images) / recipe.temperature, 1) for teacher in teachers]).mean(0)
        soft = F.cross_entropy(logits / recipe.temperature, target) * recipe.temperature**2
        return torch.lerp(F.cross_entropy(logits, labels), soft, recipe.distill_weight)

    return distillation_loss


def end_epoch(run: Run, entry: dict[str, float], val_split: Split | None, out: Path, board: Any) -> None:
    """Measure the averaged network, add `entry` to the history, write last.pt and print the log."""
    for ours, theirs in zip(run.average.buffers(), run.model.buffers()):
        ours.copy_(theirs)  # what no average is made of; of batch normalisation, update_bn measures it anew
    # On digits as they are read: augmented ones, blurred by their interpolation, have other statistics.
    plain = run.loader.split.images[::PLAIN_EVERY]
    update_bn((images / 255 for images in plain.tensor_split(math.ceil(len(plain) / 500))), run.average)
    if val_split is not None:
        entry.update(utils.scores("val", utils.predict(run.average, val_split.images), val_split.labels))
    if not all(tensor.isfinite().all() for tensor in run.average.state_dict().values()):
        raise UserError(f"the weights are not finite after epoch {entry['epoch']}; try a lower --peak-lr")
    run.history.append(entry)
    save(run, out / "last.pt", metrics={}, training=training_state(run))
    print_epoch(entry)
    if board:
        log_epoch(board, entry)


def finish(run: Run, test_split: Split | None, out: Path, board: Any) -> None:
    """Read the test set once (a fold: not at all), write model.pt and print the final accuracy."""
    metrics = {}
    if test_split is not None:
        logits = utils.predict(run.average, test_split.images)
        metrics = utils.scores("test", logits, test_split.labels)
        misread = test_split.images[logits.argmax(1) != test_split.labels]
        if board and len(misread):
            board.add_images("misclassified digits", misread[:64])
    save(run, out / "model.pt", metrics=metrics)
    finals = {name: value for name, value in {**run.history[-1], **metrics}.items() if name in TITLES}
    if board:
        log_result(board, run.recipe, finals)
    *_, (name, value) = finals.items()
    print(f"Final {TITLES[name]}: {value:.2f}%")


def announce(run: Run, images: int, device: torch.device, out: Path) -> None:
    """One line on what is about to be trained, and on the finished model that it is going to replace."""
    done, epochs = len(run.history), run.recipe.epochs
    if done:
        print(f"Resuming {out} after epoch {done} of {epochs}" if done < epochs else f"{out} is finished", flush=True)
        return
    threads = f", {run.recipe.threads} thread" + "s" * (run.recipe.threads > 1) if device.type == "cpu" else ""
    line = f"Training {count_parameters(run.model):,} parameters on {images:,} images; {device}{threads}"
    path = out / "model.pt"
    if path.exists():
        try:
            old = utils.load_checkpoint(path)
            score = "".join(f", {value:.2f}%" for name, value in old["metrics"].items() if name == "test_accuracy")
            line += f"; replaces {path} (seed {old['recipe'].get('seed')}, {len(old['history'])} epochs{score})"
        except UserError:
            line += f"; replaces {path}, which is no checkpoint of this train.py"
    print(line, flush=True)


def print_epoch(entry: dict[str, float]) -> None:
    """The log lines of one epoch, in the specification's format."""
    print(f"Epoch {entry['epoch']}\nLearning rate: {entry['learning_rate']:.6f}")
    print(f"Train Loss: {entry['train_loss']:.4f} | Accuracy: {entry['train_accuracy']:.2f}%")
    if "val_accuracy" in entry:
        print(f"Validation Loss: {entry['val_loss']:.4f} | Accuracy: {entry['val_accuracy']:.2f}%")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint and resume


def save(run: Run, path: Path, **contents: Any) -> None:
    """Write a checkpoint of the averaged network."""
    run_contents = {"recipe": asdict(run.recipe), "history": run.history, "data_crc": run.data_crc}
    utils.save_checkpoint(path, run.average, **run_contents, **contents)


def training_state(run: Run) -> dict[str, Any]:
    """What a run needs to go on, beside its checkpoint."""
    return {
        "weights": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "losses": run.loader.losses,
    }


def restore_state(run: Run, path: Path) -> None:
    """Take up what `end_epoch` wrote to `path`; UserError if it is damaged or has learnt from other images."""
    checkpoint = utils.load_checkpoint(path)
    if checkpoint["data_crc"] != run.data_crc:
        raise UserError(f"{path} was trained on other images; give the --data-dir of that run, or another --out")
    # A step on blank images shows what the state of the optimiser is made of, whichever it is.
    blank = torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE, device=next(run.model.parameters()).device)
    run.model.eval()(blank).sum().backward()
    run.optimizer.step()
    run.scheduler.step()
    try:
        state = checkpoint["training"]
        utils.require_like(state, training_state(run))
        utils.require_like(checkpoint["model"], run.average.state_dict())
        run.model.load_state_dict(state["weights"])
        run.average.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        run.loader.losses.copy_(state["losses"])
        if not 1 <= len(checkpoint["history"]) <= run.recipe.epochs:
            raise ValueError("history")
    except Exception as error:  # a spoilt state makes PyTorch raise nearly anything
        raise UserError(
            f"{path} is of another network, optimiser or schedule than the code's, or damaged ({error!r:.150})"
        ) from error
    run.history = checkpoint["history"]


def stored_recipe(path: Path) -> Recipe:
    """The recipe of a checkpoint; UserError if it is damaged or of another version."""
    stored = utils.load_checkpoint(path)["recipe"]
    try:
        return Recipe(**stored)
    except (TypeError, UserError) as error:
        raise UserError(f"{path} cannot be resumed, its recipe is of another version ({error!r:.150})") from error


def check_same(recipe: Recipe, path: Path, settings: dict[str, Any]) -> None:
    """UserError if some of `settings` are not those of `recipe`, which `path` holds."""
    others = [name for name, value in settings.items() if value != getattr(recipe, name)]
    if others:
        words = " ".join(f"{flag(name)} {format_value(getattr(recipe, name))}" for name in others)
        raise UserError(f"{path} was made with {words}; --resume keeps that, so give no other value")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; UserError if another one holds it. Ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another training writes to {folder}; wait for it or choose another --out") from error
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if fcntl:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


def open_board(folder: Path, history: list[dict[str, float]]) -> Any:
    """A SummaryWriter for `folder` with the epochs so far; UserError if package or right to write is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    try:
        board = SummaryWriter(str(folder), purge_step=0)  # what an earlier training wrote there is not shown
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    for entry in history:  # of a resumed run
        log_epoch(board, entry)
    return board


def log_epoch(board: Any, entry: dict[str, float]) -> None:
    """What the history has of the epoch; loss and accuracy of training and validation share a chart."""
    for name, value in entry.items():
        part, _, rest = name.partition("_")
        board.add_scalar(f"{rest}/{part}" if part in ("train", "val") else name, value, entry["epoch"])


def log_result(board: Any, recipe: Recipe, finals: dict[str, float]) -> None:
    """The hyperparameters with the final accuracies."""
    settings = {name: format_value(v) if isinstance(v, tuple) else v for name, v in asdict(recipe).items()}
    board.add_hparams(settings, {f"final/{name}": value for name, value in finals.items()}, run_name=".")
    board.close()


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


def run_several(args: argparse.Namespace, recipe: Recipe) -> int:
    """--runs or --folds: a process of this same command for each, some at a time, and a report on all of them."""
    if recipe.folds:
        parts = {args.out / f"fold-{k}": ["--child", "--fold", k] for k in range(1, recipe.folds + 1)}
    else:
        seeds = range(recipe.seed, recipe.seed + args.runs)
        parts = {args.out / f"seed-{seed}": ["--child", "--runs", 1, "--seed", seed] for seed in seeds}
    if args.resume:
        own = {"seed", "fold"} if "variants" in args.overrides else {"seed", "fold", "variants"}
        settings = {name: value for name, value in asdict(recipe).items() if name not in own}
        for path in (folder / "last.pt" for folder in parts):
            if path.exists():
                check_same(stored_recipe(path), path, settings)
    out_flags = ["--tensorboard", args.tensorboard / args.out.name] if args.tensorboard else []
    same = [sys.executable, __file__, *sys.argv[1:]]  # of two equal flags the last one counts
    commands = {folder: [*same, *map(str, [*words, "--out", folder, *out_flags])] for folder, words in parts.items()}
    device = utils.choose_device(args.device)
    jobs = args.jobs or (max(1, available_cores() // recipe.threads) if device.type == "cpu" else 1)
    try:
        failed = run_side_by_side(commands, jobs, recipe.epochs, "a" if args.resume else "w")
    except KeyboardInterrupt:
        print("\nStopped. What was finished is kept; the same command with --resume goes on.", file=sys.stderr)
        return 130
    if failed:
        raise UserError(f"{', '.join(failed)} failed; the same command with --resume goes on with the rest")
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
    runs = [{"run": f.name, **c["history"][-1], **c["metrics"]} for f, c in zip(folders, checkpoints)]
    columns = [name for name in TITLES if name in runs[0]]
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
        ensemble = torch.stack([utils.predict(model, test_split.images).softmax(1) for model in models]).mean(0)
        results["ensemble_test_accuracy"] = utils.accuracy(ensemble, test_split.labels)
        print(f"Test Accuracy of the {len(runs)} networks' mean prediction: {results['ensemble_test_accuracy']:.2f}%")
    utils.write_json(args.out / "runs.json", results)


def summary(values: list[float]) -> dict[str, float]:
    """Mean, sample standard deviation, standard error of the mean, minimum, maximum and number of `values`."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "sem": std / len(values) ** 0.5,
            "min": min(values), "max": max(values), "n": len(values)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `overrides` has what it says of the recipe."""
    parser = argparse.ArgumentParser(description="Train the network of model.py on MNIST.")
    recipe = parser.add_argument_group("recipe (saved in the checkpoint)")
    for f in fields(Recipe):
        words = {"type": str if isinstance(f.default, tuple) else type(f.default), **f.metadata["words"]}
        if "choices" not in words:
            words["metavar"] = words["type"].__name__.upper()
        help = f"{f.metadata['help']} (default: {format_value(f.default) or 'none'})"
        recipe.add_argument(flag(f.name), default=argparse.SUPPRESS, help=help, **words)
    utils.add_common_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("checkpoints"), metavar="DIR",
        help="folder of the checkpoints and, of --runs, of the logs (default: %(default)s)")  # fmt: skip
    add("--resume", action="store_true", help="go on from last.pt in --out, or start if there is none")
    add("--runs", type=at_least(1), default=1, metavar="N", help="train N times, with consecutive seeds")
    add("--jobs", type=at_least(1), metavar="J",
        help="runs of --runs or --folds at a time (default: one a core; on a GPU 1)")  # fmt: skip
    add("--tensorboard", type=Path, nargs="?", const=Path("runs"), metavar="DIR",
        help="write curves, images and hyperparameters for TensorBoard (default DIR: runs)")  # fmt: skip
    add("--dry-run", action="store_true", help="a few steps of everything; keeps nothing")
    add("--child", action="store_true", help=argparse.SUPPRESS)  # one of --runs or --folds, which cleans up after it
    args = parser.parse_args(argv)
    names = [f.name for f in fields(Recipe) if hasattr(args, f.name)]
    given = {name: getattr(args, name) for name in names}
    args.overrides = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "teacher" in given:
        args.overrides["teacher"] = find_teachers(args.teacher)
    if args.runs > 1 and given.get("folds"):
        raise UserError("--runs does not go with --folds")
    return args


def find_teachers(names: list[str]) -> tuple[str, ...]:
    """The absolute paths of checkpoints and, for folders, of the runs in them; UserError for a folder without any."""
    found = []
    for path in map(Path, names):
        runs = sorted(path.glob("model.pt")) or sorted(path.glob("*/model.pt")) if path.is_dir() else [path]
        if not runs:
            raise UserError(f"--teacher {path}: no model.pt in this folder or one level below")
        found += [str(run.resolve()) for run in runs]
    return tuple(found)


def check_recipe(recipe: Recipe) -> None:
    """UserError for the first setting that is out of range, or does not go with another."""
    for f in fields(recipe):
        value, (low, high) = getattr(recipe, f.name), (f.metadata["low"], f.metadata["high"])
        choices = f.metadata["words"].get("choices")
        if choices and value not in choices:
            raise UserError(f"{flag(f.name)} {value}: choose from {', '.join(choices)}")
        numbers = () if choices or f.name == "teacher" else value if isinstance(value, tuple) else (value,)
        if type(value) is not type(f.default) or not all(low <= number <= high for number in numbers):
            raise UserError(f"{flag(f.name)} {format_value(value)} is not from {low} to {high}")
    if recipe.lr > recipe.peak_lr:
        raise UserError(f"--lr {recipe.lr} is above --peak-lr {recipe.peak_lr}: the cycle rises from one to the other")
    if recipe.folds == 1 or recipe.fold > recipe.folds:
        raise UserError(f"--folds {recipe.folds} --fold {recipe.fold}: it takes 2 folds or more, and one of them")
    if recipe.folds and recipe.val_size:
        raise UserError("--folds does not go with --val-size: each fold is held out in its turn")


def flag(name: str) -> str:
    """The flag of the recipe's field `name`."""
    return "--" + name.replace("_", "-")


def format_value(value: Any) -> str:
    """A setting's value as one types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def launch(args: argparse.Namespace) -> int:
    """One run or several, as the flags ask for; returns the exit status."""
    several = args.runs > 1 or (args.overrides.get("folds") and not args.overrides.get("fold"))
    last = args.out / "last.pt"
    resumed = last if args.resume and last.exists() and not several else None
    if args.resume and not (several or resumed) and any(args.out.glob("*/last.pt")):
        raise UserError(f"{args.out} holds several runs: to resume them, repeat their --runs or --folds")
    recipe = stored_recipe(last) if resumed else Recipe(**args.overrides)
    if resumed:
        check_same(recipe, last, args.overrides)
    written = [(args.out / name).resolve() for name in ("last.pt", "model.pt")]
    if any(Path(teacher) in written for teacher in recipe.teacher):
        raise UserError(f"--teacher: this run would overwrite its teacher in {args.out}; choose another --out")
    with locked(args.out):
        return run_several(args, recipe) if several else train_once(args, recipe, resumed)


def main() -> int:
    args = parse_args()
    if not args.dry_run:
        return launch(args)
    args.overrides["epochs"] = min(2, args.overrides.get("epochs", 2))
    if args.child:
        return launch(args)
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder) / "out"
        args.tensorboard = args.tensorboard and Path(folder) / "runs"
        status = launch(args)
    print("Dry run: a few steps on a few images. The accuracy means nothing, and nothing was kept.")
    return status


if __name__ == "__main__":
    utils.run_script(main)
