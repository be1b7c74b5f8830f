"""Train the network on MNIST: `python train.py`. All flags: `python train.py --help`."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import utils
from model import ACTIVATIONS, ADAPTIVE_POOLS, Net
from utils import Augmentation, Loader, Split, UserError, in_range

EMA_EVERY = 8  # steps between two updates of the weight average: a step moves the weights too little to notice
PLAIN_EVERY = 12  # the averaged network's normalisations are measured on one training image in so many
CHECK_EVERY = 50  # steps between two looks at the loss, each of which makes a GPU wait
CHECKPOINTS = "last.pt", "model.pt"  # what a run writes: the whole state after each epoch, the network at the end
VAL_SPLIT_SEED = 0  # the same images are held out whatever --seed says, so that runs compare


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; with --resume, hyperparameters that it does not name come from the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the 16,966-parameter CNN on MNIST.")
    positive, fraction = in_range(float, 1e-12, 1e30), in_range(float, 0, 1)
    rate = in_range(float, 0, 0.95)

    recipe = parser.add_argument_group("recipe (saved in the checkpoint)")
    add = recipe.add_argument
    add(
        "--epochs",
        type=in_range(int, 1, 100_000),
        default=20,
        help="passes over the training images (default: %(default)s)",
    )
    add("--batch-size", type=in_range(int, 2, 65_536), default=64, help="images in a step (default: %(default)s)")
    add("--lr", type=positive, default=0.015, help="learning rate of the first step (default: %(default)s)")
    add("--peak-lr", type=positive, default=0.15, help="highest learning rate of the cycle (default: %(default)s)")
    add("--warmup", type=fraction, default=0.2, help="fraction of the run that rises to it (default: %(default)s)")
    add("--momentum", type=in_range(float, 0, 0.9999), default=0.9, help="Nesterov momentum (default: %(default)s)")
    add("--weight-decay", type=in_range(float, 0), default=1e-4, help="L2 penalty (default: %(default)s)")
    add("--label-smoothing", type=fraction, default=0.0, help="(default: %(default)s)")
    add("--ema", type=in_range(float, 1), default=2500.0, metavar="STEPS",
        help="length of the moving average of the weights that is saved; 1 saves the last step's "
        "(default: %(default)s)")  # fmt: skip
    add("--dropout", type=rate, nargs=4, default=[0.1, 0.2, 0.3, 0.4], metavar="P",
        help="dropout rates of the four blocks at the start (default: 0.1 0.2 0.3 0.4)")  # fmt: skip
    add("--fc-dropout", type=rate, default=0.4, metavar="P",
        help="dropout rate between the linear layers at the start (default: %(default)s)")  # fmt: skip
    add("--dropout-until", type=fraction, default=0.4, metavar="FRACTION",
        help="fraction of the run in which all dropout rates fall linearly to 0; 1 keeps them constant "
        "(default: %(default)s)")  # fmt: skip
    add("--rotation", type=in_range(float, 0, 180), default=10.0, help="degrees, either way (default: %(default)s)")
    add("--scale", type=in_range(float, 0, 0.9), default=0.1, help="0.1 is 0.9 to 1.1 (default: %(default)s)")
    add("--translate", type=fraction, default=0.05, help="fraction of the side, either way (default: %(default)s)")
    add("--shear", type=in_range(float, 0, 60), default=10.0, help="degrees, either way (default: %(default)s)")
    add("--elastic", type=in_range(float, 0, 10), default=0.35,
        help="elastic distortion: standard deviation, in pixels, of a coarse grid's points "
        "(default: %(default)s)")  # fmt: skip
    add(
        "--width",
        type=in_range(int, 1, utils.MAX_WIDTH),
        default=1,
        help="times as many channels: a teacher (default: 1)",
    )
    add("--activation", choices=tuple(ACTIVATIONS), default="silu", help="(default: %(default)s)")
    add("--adaptive-pool", choices=tuple(ADAPTIVE_POOLS), default="max", help="(default: %(default)s)")
    add("--teacher", type=str, nargs="+", default=[], metavar="PATH",
        help="checkpoints whose mean prediction the network also learns from (distillation)")  # fmt: skip
    add("--temperature", type=positive, default=1.0, help="of the distillation (default: %(default)s)")
    add("--distill-weight", type=fraction, default=0.7, help="of the teacher in the loss (default: %(default)s)")
    add("--seed", type=in_range(int, 0, 2**31), help="of weights, order, augmentation, dropout (default: 0)")
    add("--val-size", type=in_range(int, 0), default=0, metavar="N",
        help="hold out N training images, stratified, and report on them each epoch (default: 0)")  # fmt: skip
    names = [action.dest for action in recipe._group_actions]

    utils.add_common_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("checkpoints"), metavar="DIR", help="(default: checkpoints)")
    add("--resume", action="store_true", help="go on from last.pt in --out, or start if there is none")
    add("--runs", type=in_range(int, 1), default=1, metavar="N", help="train N times, with consecutive seeds")
    add("--folds", type=in_range(int, 2), metavar="K", help="K-fold cross-validation on the training images")
    add("--threads", type=in_range(int, 1, 1024), default=torch.get_num_threads(), metavar="N",
        help="CPU threads; the bits of the result depend on them (default: one a core, here %(default)s)")  # fmt: skip
    add("--tensorboard", type=Path, nargs="?", const=Path("runs"), metavar="DIR",
        help="write curves, weights, images and hyperparameters for TensorBoard (default DIR: runs)")  # fmt: skip
    add("--eager", action="store_true", help="on a GPU, launch each kernel by itself instead of one CUDA graph a step")
    add("--dry-run", action="store_true", help="a few steps of everything; keeps nothing")

    args = parser.parse_args(argv)
    if args.folds and (args.runs > 1 or args.val_size):
        parser.error("--folds goes with neither --runs nor --val-size")
    parser.set_defaults(seed=first_seed(args.out) if args.resume and args.runs > 1 else 0)
    args = parser.parse_args(argv)
    if args.resume and (saved := first_checkpoint(args)):
        stored = saved_recipe(saved, parser, [*names, "threads"])
        if args.runs > 1:  # each has its own
            del stored["seed"]
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
        for name, value in stored.items():
            if getattr(args, name) != value:
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                parser.error(f"{flag}: {saved} was made with {value}, and --resume keeps it")
    args.recipe = {name: getattr(args, name) for name in names}
    return args


def run_folders(args: argparse.Namespace) -> list[Path]:
    """Where the run, or each of several runs or folds, keeps its files."""
    if args.folds:
        return [args.out / f"fold-{k + 1}" for k in range(args.folds)]
    if args.runs > 1:
        return [args.out / f"seed-{args.seed + i}" for i in range(args.runs)]
    return [args.out]


def first_checkpoint(args: argparse.Namespace) -> Path | None:
    """The first last.pt in `run_folders`; None if there is none."""
    return next((folder / "last.pt" for folder in run_folders(args) if (folder / "last.pt").exists()), None)


def first_seed(out: Path) -> int:
    """The lowest seed of which `--runs` has begun a run in `out`; 0 if there is none."""
    names = [path.parent.name.partition("-")[2] for path in out.glob("seed-*/last.pt")]
    return min((int(name) for name in names if name.isdecimal()), default=0)


def saved_recipe(path: Path, parser: argparse.ArgumentParser, names: list[str]) -> dict[str, Any]:
    """The flags `names` as the checkpoint at `path` has them, held to the parser's rules; UserError if broken."""
    checkpoint = utils.load_checkpoint(path)
    training = checkpoint.get("training")
    stored = {**checkpoint["recipe"], "threads": training.get("threads") if isinstance(training, dict) else None}
    words: list[str] = []
    for name in names:
        value = stored.get(name)
        values = value if isinstance(value, list) else [value]
        if values:  # there may be no teachers
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            flags = parser.parse_args(words)
    except SystemExit as error:
        raise UserError(f"{path} cannot be resumed: its recipe is damaged, or of another version") from error
    return {name: getattr(flags, name) for name in names}


class Step:
    """One step of SGD: forward, loss, backward, update. On a GPU it is captured as a CUDA graph and replayed.

    Called with x float (B, 1, 28, 28) and y (B,). The losses of the epoch's steps and the number of
    correct predictions stay on the device, in `losses` and `correct`, until somebody asks.
    """

    WARMUP = 3  # steps before a capture, in which libraries choose their kernels

    def __init__(
        self, model: Net, optimizer: torch.optim.Optimizer, loss_fn: Callable, steps: int, use_graph: bool
    ) -> None:
        self.model, self.optimizer, self.loss_fn, self.use_graph = model, optimizer, loss_fn, use_graph
        device = next(model.parameters()).device
        self.losses = torch.zeros(steps, device=device)
        self.index = torch.zeros((), dtype=torch.long, device=device)
        self.correct = torch.zeros((), dtype=torch.long, device=device)
        self.graph, self.done, self.dropout = None, 0, None
        self.stream = torch.cuda.Stream(device) if use_graph else None

    def begin_epoch(self, dropout: float) -> None:
        """Zero the counters and scale the dropout rates, which a graph holds as constants, by `dropout`."""
        self.model.train()
        if dropout != self.dropout:
            self.model.scale_dropout(dropout)
            self.graph, self.dropout = None, dropout
        for counter in (self.losses, self.index, self.correct):
            counter.zero_()

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.done += 1
        if not self.use_graph:
            self._step(x, y)
            return
        if self.done <= self.WARMUP:
            self._on_side_stream(x, y)
            return
        if self.graph is None:
            self._capture(x, y)
        if x.shape == self.x.shape:
            self.x.copy_(x)
            self.y.copy_(y)
            self.graph.replay()
        else:  # the last, smaller batch
            self._step(x, y)

    def _step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(x)
        loss = self.loss_fn(logits, y, x)
        loss.backward()
        self.optimizer.step()
        self.losses.scatter_(0, self.index.view(1), loss.detach().view(1))
        self.index += 1
        self.correct += (logits.detach().argmax(1) == y).sum()

    def _on_side_stream(self, x: Tensor, y: Tensor) -> None:
        """A warm-up step, away from the default stream, as torch.cuda.graph asks for."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._step(x, y)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, x: Tensor, y: Tensor) -> None:
        """Record the step without running it; UserError where that cannot be done."""
        self.x, self.y, graph = x.clone(), y.clone(), torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                self._step(self.x, self.y)
        except RuntimeError as error:
            raise UserError(f"no CUDA graph on this machine ({str(error).splitlines()[0]}); add --eager") from error
        self.graph = graph


def classification_loss(logits: Tensor, labels: Tensor, _images: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of logits (B, 10) with labels (B,)."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def distillation_loss(
    logits: Tensor, labels: Tensor, images: Tensor, *, teachers: list[Net], temperature: float, weight: float,
    label_smoothing: float,
) -> Tensor:  # fmt: skip
    """Hinton et al. (2015): cross-entropy with the labels and, by `weight`, with the teachers' softened mean.

    The teachers see the same augmented images (B, 1, 28, 28). The second term is scaled by
    temperature squared, which keeps its gradient's size.
    """
    with torch.no_grad():
        target = torch.stack([F.softmax(teacher(images) / temperature, 1) for teacher in teachers]).mean(0)
    soft = F.cross_entropy(logits / temperature, target) * temperature**2
    return (1 - weight) * classification_loss(logits, labels, images, label_smoothing) + weight * soft


def make_loss(recipe: dict[str, Any], device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """loss(logits, labels, images) of the recipe."""
    smoothing = recipe["label_smoothing"]
    if not recipe["teacher"]:
        return partial(classification_loss, label_smoothing=smoothing)
    teachers = []
    for path in recipe["teacher"]:
        teacher, checkpoint = utils.load_model(Path(path), device)
        teachers.append(fold_norms(teacher))
        if held_out(recipe) and held_out(checkpoint["recipe"]) != held_out(recipe):
            utils.warn(f"{path} may have been trained on images that are held out here: validation will look too good")
    return partial(
        distillation_loss, teachers=teachers, temperature=recipe["temperature"], weight=recipe["distill_weight"],
        label_smoothing=smoothing,
    )  # fmt: skip


def held_out(recipe: dict[str, Any]) -> tuple:
    """Which training images a run with `recipe` does not see: the same for the same value, all seen if empty."""
    if "fold" in recipe:
        return recipe["folds"], recipe["fold"]
    return (recipe["val_size"],) if recipe.get("val_size") else ()


def fold_norms(model: Net) -> Net:
    """`model`, in eval mode, with each normalisation folded into the convolution before it: the same, but faster."""
    for block in model.blocks():
        block.conv = fuse_conv_bn_eval(block.conv, block.norm)
        block.norm = nn.Identity()
    return model


def dropout_factor(epoch: int, epochs: int, until: float) -> float:
    """What the dropout rates of `epoch` (from 0) are multiplied by: 1 falling to 0 at the fraction `until` of the run.

    Early dropout, after Liu et al., "Dropout Reduces Underfitting" (ICML 2023).
    """
    return 1.0 if until == 1 else max(0.0, 1 - epoch / (until * epochs)) if until else 0.0


class Trainer:
    """Everything that a run changes from step to step, and that a checkpoint must hold: weights, average, momentum."""

    def __init__(self, recipe: dict[str, Any], train: Split, device: torch.device, eager: bool = False) -> None:
        self.recipe = recipe
        torch.manual_seed(utils.derive_seed(recipe["seed"]))
        rates = [*recipe["dropout"], recipe["fc_dropout"]]
        self.model = utils.place(Net(recipe["width"], recipe["activation"], recipe["adaptive_pool"], rates), device)
        self.ema = utils.make_ema(self.model, max(1, recipe["ema"] / EMA_EVERY))
        self.optimizer = utils.make_optimizer(self.model, recipe["lr"], recipe["momentum"], recipe["weight_decay"])
        augmentation = Augmentation(*(recipe[name] for name in Augmentation._fields))
        self.loader = Loader(train, recipe["batch_size"], augmentation, recipe["seed"])
        self.plain_loader = Loader(train.select(slice(None, None, PLAIN_EVERY)), batch_size=500)
        self.step = Step(self.model, self.optimizer, make_loss(recipe, device), len(self.loader),
                         use_graph=device.type == "cuda" and not eager)  # fmt: skip
        self.history: list[dict[str, float]] = []

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train epoch number `epoch` (from 0) and say how it went; UserError if the loss stops being finite."""
        recipe, steps, start = self.recipe, len(self.loader), time.perf_counter()
        factor = dropout_factor(epoch, recipe["epochs"], recipe["dropout_until"])
        torch.manual_seed(utils.derive_seed(recipe["seed"], epoch, 1))  # dropout
        self.loader.set_epoch(epoch)
        self.step.begin_epoch(factor)
        bar = tqdm(self.loader, f"Epoch {epoch + 1}/{recipe['epochs']}", leave=False, disable=None, dynamic_ncols=True)
        for i, (x, y) in enumerate(bar):
            now = epoch * steps + i
            utils.set_lr(self.optimizer, self.learning_rate(now))
            self.step(x, y)
            if (now + 1) % EMA_EVERY == 0 or now + 1 == recipe["epochs"] * steps:
                self.ema.update_parameters(self.model)
            if (i + 1) % CHECK_EVERY == 0 or i + 1 == steps:
                loss, accuracy = self.progress(i + 1, epoch)
                bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2f}%", refresh=False)
        update_bn(self.plain_loader, self.ema.module)  # digits to be read are not augmented: theirs differ
        return {
            "epoch": epoch + 1, "learning_rate": self.learning_rate(epoch * steps), "dropout_factor": factor,
            "train_loss": loss, "train_accuracy": accuracy, "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def learning_rate(self, step: int) -> float:
        """Learning rate of step number `step` (from 0) of the run."""
        r = self.recipe
        return utils.one_cycle(step, r["epochs"] * len(self.loader), r["lr"], r["peak_lr"], r["warmup"])

    def progress(self, done: int, epoch: int) -> tuple[float, float]:
        """Mean loss and accuracy in percent of the epoch's first `done` steps; UserError if a loss is not finite."""
        losses = self.step.losses[:done].cpu()
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            raise UserError(
                f"the loss is {losses[first].item()} at step {first + 1} of epoch {epoch + 1}; the checkpoint of the "
                "epoch before, if any, is kept; try a lower --peak-lr"
            )
        sizes = torch.full((done,), float(self.loader.batch_size))
        if done == len(self.loader):
            sizes[-1] = len(self.loader.split.labels) - (done - 1) * self.loader.batch_size
        return float(losses @ sizes / sizes.sum()), 100 * self.step.correct.item() / int(sizes.sum())

    def averaged(self) -> Net:
        """The network that is evaluated and saved: the averaged weights, once there are any."""
        return self.ema.module if self.ema.n_averaged else self.model

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the recipe. Random numbers are not in it: each epoch seeds its own."""
        return {
            "weights": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
            "history": self.history, "threads": torch.get_num_threads(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a `state`, from whatever device, into this run's own memory; ValueError if it is not sound."""
        self.model.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        groups = self.optimizer.state_dict()["param_groups"]  # the recipe's; on a GPU a graph follows their rate
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        for parameter in self.model.parameters() if self.recipe["momentum"] else ():
            momentum = self.optimizer.state[parameter]["momentum_buffer"]
            if momentum.shape != parameter.shape or not momentum.isfinite().all():
                raise ValueError("momentum")
            self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        self.history = [dict(entry) for entry in state["history"]]
        numbers = all(isinstance(value, (int, float)) for entry in self.history for value in entry.values())
        if not self.finite() or not numbers or any("train_accuracy" not in entry for entry in self.history):
            raise ValueError("values")

    def finite(self) -> bool:
        """Whether weights and averages are finite numbers."""
        tensors = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)


def board_folder(args: argparse.Namespace, out: Path) -> Path:
    """Where TensorBoard finds the run that writes to `out`, which is --out or a folder in it."""
    return args.tensorboard / out.relative_to(args.out.parent)


def summary_writer(folder: Path) -> Any:
    """A SummaryWriter for `folder`; UserError if the tensorboard package or the right to write is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


class TensorBoard:
    """Curves and weight histograms by epoch, and the first batch of augmented digits."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.trainer, self.writer = trainer, summary_writer(folder)
        images, _ = next(iter(trainer.loader))
        self.writer.add_images("augmented digits", (images * utils.STD).clamp(0, 1))
        for entry in trainer.history:  # of a resumed run, which may have had no board before
            self.log_epoch(entry)

    def log_epoch(self, entry: dict[str, float]) -> None:
        """Everything that `history.json` has of the epoch."""
        epoch = int(entry["epoch"])
        for name, value in entry.items():
            if name not in ("epoch", "seconds", "dropout_factor"):
                part, _, rest = name.partition("_")
                self.writer.add_scalar(f"{rest}/{part}" if part in ("train", "val") else name, value, epoch)
        for block, rate in enumerate(self.trainer.model.dropout_rates[:4], 1):
            self.writer.add_scalar(f"dropout_rate/block{block}", rate * entry["dropout_factor"], epoch)

    def log_weights(self, epoch: int) -> None:
        """Each weight tensor's histogram."""
        for name, weights in self.trainer.averaged().named_parameters():
            self.writer.add_histogram(name, weights, epoch)

    def close(self) -> None:
        """Write out what is still in memory."""
        self.writer.close()


def log_result(folder: Path, recipe: dict[str, Any], metrics: dict[str, float], test: Split, logits: Tensor) -> None:
    """For TensorBoard, the misclassified test digits and the hyperparameters with their final accuracy."""
    writer = summary_writer(folder)
    wrong = (logits.argmax(1) != test.labels).nonzero().flatten()
    if len(wrong):
        writer.add_images("misclassified digits", test.images[wrong[:64]])
    plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in recipe.items()}
    finals = {f"final/{name}": value for name, value in metrics.items() if name.endswith("accuracy")}
    writer.add_hparams(plain, finals, run_name=".")
    writer.close()


def print_epoch(entry: dict[str, float]) -> None:
    """The log lines of one epoch, in the seed's format."""
    tqdm.write(f"Epoch {entry['epoch']}\nLearning rate: {entry['learning_rate']:.6f}")
    tqdm.write(f"Train Loss: {entry['train_loss']:.4f} | Accuracy: {entry['train_accuracy']:.2f}%")
    if "val_accuracy" in entry:
        tqdm.write(f"Validation Loss: {entry['val_loss']:.4f} | Accuracy: {entry['val_accuracy']:.2f}%")
    sys.stdout.flush()


def train(recipe: dict[str, Any], train: Split, val: Split | None, out: Path, device: torch.device,
          args: argparse.Namespace) -> tuple[Net, list[dict[str, float]]]:  # fmt: skip
    """Train one network, writing last.pt and history.json each epoch; returns the averaged network and the history."""
    last = out / "last.pt"
    trainer = Trainer(recipe, train, device, args.eager)
    inputs = files_learnt_from(args.data_dir, recipe)
    if args.resume and last.exists():
        checkpoint = utils.load_checkpoint(last)
        if checkpoint["recipe"] != recipe:
            raise UserError(f"{last} was made by another recipe; give the flags of that run, or another --out")
        restore(trainer, checkpoint, last, inputs)
        utils.write_json(out / "history.json", trainer.history)  # a kill may have come between the two files
        print(f"Resuming {out} after epoch {len(trainer.history)} of {recipe['epochs']}")
    elif args.resume:
        print(f"No {last} yet: starting with epoch 1")
    board = TensorBoard(board_folder(args, out), trainer) if args.tensorboard else None
    for epoch in range(len(trainer.history), recipe["epochs"]):
        entry = trainer.train_epoch(epoch)
        if val is not None:
            logits = utils.predict(trainer.averaged(), val)
            entry["val_loss"] = F.cross_entropy(logits, val.labels).item()
            entry["val_accuracy"] = utils.accuracy(logits, val.labels)
        trainer.history.append(entry)
        if not trainer.finite():
            raise UserError(f"the weights are not finite after epoch {epoch + 1}; try a lower --peak-lr")
        metrics = {name: value for name, value in entry.items() if name.startswith(("train_", "val_"))}
        contents = utils.release_contents(trainer.averaged(), recipe, epoch + 1, metrics)
        utils.save_checkpoint(last, {**contents, "training": {**trainer.state(), "inputs": inputs}})
        utils.write_json(out / "history.json", trainer.history)
        print_epoch(entry)
        if board:
            board.log_epoch(entry)
            board.log_weights(epoch + 1)
    if board:
        board.close()
    return trainer.averaged(), trainer.history


def files_learnt_from(data_dir: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """MD5 sums of the training images and labels and of the teachers, by name."""
    sums = {name: md5 for name, md5 in utils.prepare_mnist(data_dir).items() if name.startswith("train")}
    return {**sums, **{teacher: utils.md5_sum(Path(teacher)) for teacher in recipe["teacher"]}}


def restore(trainer: Trainer, checkpoint: dict[str, Any], path: Path, inputs: dict[str, str]) -> None:
    """Take up the run of `checkpoint`; UserError if its state is not whole, or it learnt from other files."""
    utils.build_model(checkpoint, path)
    try:
        trainer.restore(checkpoint["training"])
        before = dict(checkpoint["training"]["inputs"])
        sound = len(trainer.history) == checkpoint["epoch"] <= trainer.recipe["epochs"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} cannot be resumed: its training state is damaged ({type(error).__name__})") from error
    if not sound:
        raise UserError(f"{path} cannot be resumed: its training state is damaged")
    changed = [name for name, md5 in inputs.items() if before.get(name) != md5]
    if changed:
        raise UserError(f"{changed[0]} has changed since {path} was written; put the old file back, or start anew")


def run_once(args: argparse.Namespace, recipe: dict[str, Any], out: Path, device: torch.device) -> dict[str, Any]:
    """One run as the recipe says: train, then read the test set once, then write model.pt."""
    train_split, val = utils.load_mnist(args.data_dir, train=True, device=device), None
    if recipe["val_size"]:
        if recipe["val_size"] >= len(train_split.labels):
            raise UserError(
                f"--val-size {recipe['val_size']} leaves none of {len(train_split.labels)} images to train on"
            )
        train_split, val = utils.hold_out(train_split, recipe["val_size"], VAL_SPLIT_SEED)
    test = utils.load_mnist(args.data_dir, train=False, device=device)
    if args.dry_run:
        train_split, val, test = shorten(train_split, recipe), val and shorten(val, recipe), shorten(test, recipe)
    model, history = train(recipe, train_split, val, out, device, args)

    logits = utils.predict(model, test)
    metrics = {name: value for name, value in history[-1].items() if name.startswith(("train_", "val_"))}
    metrics["test_loss"] = F.cross_entropy(logits, test.labels).item()
    metrics["test_accuracy"] = utils.accuracy(logits, test.labels)
    utils.save_checkpoint(out / "model.pt", utils.release_contents(model, recipe, recipe["epochs"], metrics))
    if args.tensorboard:
        log_result(board_folder(args, out), recipe, metrics, test, logits)
    return {"seed": recipe["seed"], **metrics, "logits": logits, "labels": test.labels}


def shorten(split: Split, recipe: dict[str, Any]) -> Split:
    """The first few batches of `split`, for a dry run."""
    return Split(*(tensor[: 8 * recipe["batch_size"]] for tensor in split))


def summary(values: list[float]) -> dict[str, float]:
    """Mean, sample standard deviation, minimum, maximum and number of `values`."""
    tensor = torch.tensor(values, dtype=torch.float64)
    deviation = tensor.std().item() if len(values) > 1 else 0.0
    return {"mean": tensor.mean().item(), "std": deviation, "min": min(values), "max": max(values), "n": len(values)}


def summary_line(name: str, s: dict[str, float]) -> str:
    """A summary as a person reads it."""
    return (f"{name}: mean {s['mean']:.3f}%  std {s['std']:.3f}  min {s['min']:.2f}%  max {s['max']:.2f}%"
            f"  ({s['n']} runs)")  # fmt: skip


def run_several(args: argparse.Namespace, device: torch.device) -> None:
    """--runs N: consecutive seeds, each in a folder of its own, their table, summary and ensemble in runs.json."""
    results = []
    for i in counted(range(args.runs), "Runs"):
        seed, folder = args.seed + i, run_folders(args)[i]
        tqdm.write(f"--- seed {seed}")
        with utils.locked(folder):
            results.append(run_once(args, {**args.recipe, "seed": seed}, folder, device))
    ensemble = torch.stack([r["logits"].softmax(1) for r in results]).mean(0)
    columns = [name for name in ("val_accuracy", "test_accuracy") if name in results[0]]
    report: dict[str, Any] = {"recipe": args.recipe, "versions": utils.versions()}
    report["runs"] = [{k: v for k, v in r.items() if k not in ("logits", "labels")} for r in results]
    report.update({name: summary([r[name] for r in results]) for name in columns})
    report["ensemble_test_accuracy"] = utils.accuracy(ensemble, results[0]["labels"])
    utils.write_json(args.out / "runs.json", report)

    print("\nSeed  " + "  ".join(f"{name.replace('_accuracy', ''):>8}" for name in columns))
    for r in results:
        print(f"{r['seed']:4d}  " + "  ".join(f"{r[name]:7.2f}%" for name in columns))
    for name in columns:
        print(summary_line(name.replace("_accuracy", "").capitalize() + " accuracy", report[name]))
    print(f"Ensemble of the {args.runs}, test accuracy: {report['ensemble_test_accuracy']:.2f}%")


def cross_validate(args: argparse.Namespace, device: torch.device) -> None:
    """--folds K: K stratified folds of the training images, each held out once; the test set is not read."""
    everything = utils.load_mnist(args.data_dir, train=True, device=device)
    if args.folds > len(everything.labels) // 10:
        raise UserError(f"--folds {args.folds}: too many for {len(everything.labels)} images")
    folds = utils.stratified_folds(everything.labels, args.folds, VAL_SPLIT_SEED)
    entries = []
    for k in counted(range(args.folds), "Folds"):
        tqdm.write(f"--- fold {k + 1} of {args.folds}")
        rest = torch.ones(len(everything.labels), dtype=torch.bool, device=device)
        rest[folds[k]] = False
        parts = everything.select(rest), everything.select(folds[k])
        if args.dry_run:
            parts = tuple(shorten(part, args.recipe) for part in parts)
        recipe = {**args.recipe, "folds": args.folds, "fold": k + 1}
        folder = run_folders(args)[k]
        with utils.locked(folder):
            _, history = train(recipe, *parts, folder, device, args)
        entries.append(
            {"fold": k + 1, "train_size": len(parts[0].labels), "val_size": len(parts[1].labels), **history[-1]}
        )
    result = summary([entry["val_accuracy"] for entry in entries])
    report = {"recipe": args.recipe, "versions": utils.versions(), "folds": entries, "val_accuracy": result}
    utils.write_json(args.out / "cross_validation.json", report)
    print("\nFold  Validation accuracy")
    for entry in entries:
        print(f"{entry['fold']:4d}  {entry['val_accuracy']:7.2f}%")
    print(summary_line("Cross-validation accuracy", result).replace("runs", "folds"))


def counted(items: range, title: str) -> Iterator[int]:
    """A progress bar over runs or folds, below which each run shows its own."""
    return iter(tqdm(items, title, disable=None, dynamic_ncols=True, position=1))


def how_to_resume() -> str:
    """The command line of this run, with --resume."""
    words = [word for word in sys.argv if word != "--resume"]
    return shlex.join(["python", *words, "--resume"])


def main() -> int:
    args = parse_args()
    device = utils.choose_device(args.device)
    torch.set_num_threads(args.threads)
    if args.dry_run:
        args.recipe.update(epochs=min(2, args.recipe["epochs"]))
        with tempfile.TemporaryDirectory() as folder:
            args.out, args.resume = Path(folder) / "out", False
            args.tensorboard = args.tensorboard and Path(folder) / "runs"
            return start(args, device)
    with utils.locked(args.out):
        return start(args, device)


def start(args: argparse.Namespace, device: torch.device) -> int:
    """Do what the flags ask for; returns the exit status."""
    began = time.time()
    for teacher in args.teacher:
        if Path(teacher).resolve() in {(f / name).resolve() for f in run_folders(args) for name in CHECKPOINTS}:
            raise UserError(f"--teacher: this run would overwrite its teacher {teacher}; choose another --out")
    try:
        if args.folds:
            cross_validate(args, device)
        elif args.runs > 1:
            run_several(args, device)
        else:
            result = run_once(args, args.recipe, args.out, device)
            print(f"Final Test Accuracy: {result['test_accuracy']:.2f}%")
    except KeyboardInterrupt:
        saved = first_checkpoint(args)
        if saved and not args.dry_run and (args.resume or saved.stat().st_mtime >= began):
            print(f"\nStopped. Finished epochs are kept; go on with: {how_to_resume()}", file=sys.stderr)
        else:
            print("\nStopped before the first epoch was finished: nothing was written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    utils.run_script(main)
