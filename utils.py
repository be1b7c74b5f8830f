"""What the scripts share: flags, device, data, augmentation, optimiser, prediction, checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gzip
import io
import json
import math
import os
import re
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from model import CLASS_NAMES, IMAGE_SIZE, Net

ROOT = Path(__file__).resolve().parent
SPLITS = {"test": "test", "val": "validation", "train": "training"}

# --- Errors and flags ---


class UserError(Exception):
    """An error that the user can mend: one line says what is wrong and what to do."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = str(action.default) in ("None", "False", "[]")
        return action.help if has_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help tells the defaults."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=Help)

    def error(self, message: str) -> None:
        raise UserError(message)


def run_script(main: Callable[[], int | None]) -> None:
    """Exit with the status of `main`; a UserError is one line on stderr and status 2."""
    torch.set_num_threads(1)  # more are slower on a busy machine
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        # Some file names cannot be printed. In a log, an error comes last.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        status = main()
    except UserError as error:
        status = 2
        say("error", str(error))
    except KeyboardInterrupt:
        status = 130
        print("Stopped.", file=sys.stderr)
    except BrokenPipeError:  # the reader, such as head, has ended
        status = 1
        sys.stdout = None  # or Python writes the rest at exit, and fails again
    except OSError as error:
        if error.filename is not None:  # a file, not stdout
            raise
        status = 2
        sys.stdout = None
        say("error", f"cannot write the output: {error.strerror}")
    sys.exit(status)


def say(kind: str, message: str) -> None:
    """Print an "error" or a "warning" on stderr, as argparse does."""
    print(f"{Path(sys.argv[0]).name}: {kind}: {message}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """`error` in a line of at most 150 characters, without PyTorch's colours."""
    return " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())[:150]


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # in no range
        if not low <= value <= high:
            name = "whole number" if kind is int else "number"
            span = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not a {name} {span}")
        return value

    return parse


def add_common_flags(parser: Parser) -> None:
    """--data-dir and --device, for all three scripts."""
    add = parser.add_argument
    data_dir = Path(os.environ.get("MNIST_DATA_DIR") or ROOT / "data")
    add("--data-dir", type=Path, default=data_dir, metavar="DIR", help="folder of the data set")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda if it works, else cpu")


def add_checkpoint_flags(parser: Parser) -> None:
    """Those of the two scripts that read a checkpoint."""
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("checkpoints"), metavar="PATH",
        help="weights of train.py, or their folder")
    add("--split", choices=tuple(SPLITS), default="test",
        help="read the test images, those held out from training, or the training images")
    add("--tta", action="store_true",
        help="test-time augmentation: nine looks at images that one look is not sure of")
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="read these images, or folders of images; each shows a digit or a number")
    add("--raw", action="store_true",
        help="give --images of 28x28 pixels, ink 255, to the network as they are")


def refuse_unused(parser: Parser, args: argparse.Namespace, name: str, others: list[str]) -> None:
    """UserError if --`name` is given together with one of `others`, which it would ignore."""
    for other in others:
        if getattr(args, name) and getattr(args, other) != parser.get_default(other):
            raise UserError(f"--{name} does not go with --{other.replace('_', '-')}")


# --- Device and seeds ---


def choose_device(name: str) -> torch.device:
    """The device called `name`; UserError if it does not work. "auto" is cuda, else the CPU."""
    device = name
    if name == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).add(1).item()
    except (AssertionError, RuntimeError) as error:  # no CUDA; GPU too old, full or taken
        if name != "auto":
            raise UserError(f"--device {name}: {one_line(error)}; try --device cpu") from error
        say("warning", f"the GPU cannot be used, the CPU is: {one_line(error)}")
        device = "cpu"
    return torch.device(device)


def to_device(model: Net, device: torch.device) -> Net:
    """Move `model` to `device`. A CPU is fastest with channels-last memory."""
    if device.type == "cpu":
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


HELD_OUT, DROPOUT, WEIGHTS, VARIANTS, ORDER = range(5)  # `use` of derive_seed


def derive_seed(use: int, seed: int = 0, epoch: int = 0) -> int:
    """A 32-bit seed for each (use, seed, epoch)."""
    return int(np.random.SeedSequence((seed, epoch, use)).generate_state(1)[0])


# --- Data ---


@dataclass
class Split:
    """Images uint8 (N, 1, 28, 28), 0 to 255, and labels int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor | slice) -> Split:
        """The images and labels at `index`."""
        return Split(self.images[index], self.labels[index])


def load_mnist(data_dir: Path, train: bool, device: torch.device) -> Split:
    """The training or the test images in `data_dir`, on `device`.

    UserError for files that are missing or damaged, or do not fit the network.
    """
    if any(path.is_dir() for path in [*data_dir.glob("train/*"), *data_dir.glob("test/*")]):
        from extras import folders

        images, labels = folders.load(data_dir, train)
        return Split(images.unsqueeze(1).to(device), labels.to(device))
    image_file = find_idx(data_dir, train, "images-idx3-ubyte")
    label_file = find_idx(data_dir, train, "labels-idx1-ubyte")
    images = read_idx(image_file)
    labels = read_idx(label_file)
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        shape = tuple(images.shape)
        raise UserError(f"{image_file} has the shape {shape}; model.py: IMAGE_SIZE = {IMAGE_SIZE}")
    if labels.shape != images.shape[:1]:
        shape = tuple(labels.shape)
        raise UserError(f"{label_file} has the shape {shape}; ({len(images)},) is needed")
    if labels.max() >= len(CLASS_NAMES):
        raise UserError(f"{label_file} has labels up to {labels.max()}; "
                        f"model.py: CLASS_NAMES has {len(CLASS_NAMES)}")
    if image_file.name.startswith("emnist"):
        images = images.mT.contiguous()  # EMNIST's are transposed
    return Split(images.unsqueeze(1).to(device), labels.long().to(device))


def find_idx(data_dir: Path, train: bool, kind: str) -> Path:
    """The file of this `kind`, packed or not: in MNIST/raw, else the nearest one in `data_dir`.

    UserError if there is none, or if there are several.
    """
    names = [f"train-{kind}"] if train else [f"t10k-{kind}", f"test-{kind}"]
    for pattern in ("MNIST/raw", ".", "*", "*/*"):
        found = {}
        for path in sorted(data_dir.glob(f"{pattern}/*ubyte*")):
            name = path.name.replace(".idx", "-idx")  # Kaggle's
            if path.is_file() and any(wanted in name for wanted in names):
                found[str(path).replace(".gz", "")] = path  # x and x.gz count once
        if len(found) > 1:
            raise UserError(f"--data-dir {data_dir} holds several data sets: {', '.join(found)}; "
                            "name one")
        if found:
            return found.popitem()[1]
    raise UserError(f"no file {names[0]} in {data_dir} or the folders in it; give --data-dir")


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an IDX file (see LeCun's MNIST page), packed or not.

    UserError if the file is damaged.
    """
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            zeros, kind, dims = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            size = math.prod(shape)
            if zeros != 0 or size == 0:
                raise ValueError("its header is wrong")
            if kind != 8:
                raise ValueError(f"its numbers are of type {kind:#04x}, not 0x08 (uint8)")
            data = bytearray(file.read(size + 1))  # + 1 reaches the end: gzip checks there
            if len(data) != size:
                what = "truncated" if len(data) < size else "too long"
                raise ValueError(f"{what}, its header says {shape}")
    except Exception as error:  # a damaged file makes gzip and struct raise nearly anything
        raise UserError(f"{path} is damaged or not an IDX file: {error}") from error
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def checksum(split: Split) -> int:
    """CRC-32 of images and labels."""
    return zlib.crc32(split.labels.cpu().numpy(), zlib.crc32(split.images.cpu().numpy()))


def make_splits(everything: Split, recipe: dict[str, Any]) -> tuple[Split, Split | None]:
    """The images to train on, and those held out, if any, by `recipe`. Its "fold" counts from 1.

    They are stratified, and the same for every seed. Folds are disjoint, and together they are all
    images. UserError if there are too few.
    """
    folds = recipe["folds"]
    count = len(everything)
    too_many = f"--train-size, --val-size or --folds ask for too many of {count:,} images"
    if recipe["val_size"] >= count or 10 * folds > count:  # ten images a fold at least
        raise UserError(too_many)
    generator = torch.Generator().manual_seed(derive_seed(HELD_OUT))
    shuffled = torch.randperm(count, generator=generator)
    labels = everything.labels.cpu()[shuffled]
    by_class = shuffled[labels.argsort(stable=True)]
    if folds:
        held_out = by_class[recipe["fold"] - 1 :: folds]
    else:
        held_out = pick_evenly(by_class, recipe["val_size"])
    rest = by_class[~torch.isin(by_class, held_out)]
    if recipe["train_size"] > len(rest):
        raise UserError(too_many)
    rest = pick_evenly(rest, recipe["train_size"] or len(rest))
    device = everything.labels.device
    train_split = everything.select(rest.sort().values.to(device))
    if not len(held_out):
        return train_split, None
    return train_split, everything.select(held_out.sort().values.to(device))


def pick_evenly(index: Tensor, size: int) -> Tensor:
    """`size` evenly spaced entries of `index` (N,): stratified if `index` is by class."""
    return index[(torch.arange(size) * len(index) + len(index) // 2) // max(size, 1)]


def load_split(
    name: str, data_dir: Path, checkpoint: dict[str, Any], device: torch.device
) -> Split:
    """The "test", "val" or "train" images of `checkpoint`; UserError if they are not there."""
    if name == "test":
        return load_mnist(data_dir, train=False, device=device)
    everything = load_mnist(data_dir, train=True, device=device)
    if checksum(everything) != checkpoint["data_crc"]:
        raise UserError(f"--split {name}: {data_dir} has other training images or labels than "
                        "this checkpoint")
    train_split, val_split = make_splits(everything, checkpoint["recipe"])
    if name == "train":
        return train_split
    if val_split is None:
        raise UserError("--split val: this training held out no images; train with --val-size")
    return val_split


# --- Batches and augmentation ---

PASSES_PER_EPOCH = 3  # after the first epoch
CHUNK = 1024  # images to augment at once: few calls, and the result fits a CPU's cache
ELASTIC_GRID = 5  # K: control points along each side


class Loader:
    """Shuffled, augmented batches of the training images `split`.

    The first epoch shows each image once. After it most images have a loss near zero and teach
    little. So a later epoch is three passes, each over a third of the images, chosen anew: a share
    "hard_fraction" with the largest losses, the rest at random (after Jiang et al., "Accelerating
    Deep Learning by Focusing on the Biggest Losers", 2019). The training loop keeps the last loss
    of each image in `losses` (N,).

    `variants`: images uint8 (N, 1, 28, 28) to show instead, each with its probability (N,).
    """

    def __init__(
        self, split: Split, recipe: dict[str, Any], variants: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.split = split
        self.recipe = recipe
        self.variants = variants
        self.losses = torch.zeros(len(split), device=split.labels.device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.split) / self.recipe["batch_size"])

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of `epoch` (from 0): images float (B, 1, 28, 28), labels (B,), index (B,).

        They depend on `epoch`, `losses` and the loader's arguments alone.
        """
        seed = derive_seed(ORDER, self.recipe["seed"], epoch)
        generator = torch.Generator().manual_seed(seed)
        batch_size = self.recipe["batch_size"]
        chunk = batch_size * max(1, CHUNK // batch_size)
        passes = 1
        if epoch > 0 and self.recipe["hard_fraction"] > 0:
            passes = min(PASSES_PER_EPOCH, len(self))
        shown = 0
        for i in range(1, passes + 1):
            end = min(batch_size * (len(self) * i // passes), len(self.split))  # of a batch
            for index in self.choose(end - shown, generator).split(chunk):
                images = self.with_variants(index, generator) / 255
                images = augment(images, self.recipe, generator)
                tensors = (images, self.split.labels[index], index)
                yield from zip(*(tensor.split(batch_size) for tensor in tensors))
            shown = end

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` shuffled indices: a "hard_fraction" with the largest losses, others at random."""
        priority = torch.rand(len(self.losses), generator=generator)
        hardest = self.losses.topk(int(self.recipe["hard_fraction"] * count)).indices
        priority[hardest.cpu()] += 1  # above all others
        chosen = priority.topk(count).indices
        return chosen[torch.randperm(count, generator=generator)].to(self.losses.device)

    def with_variants(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """The images at `index` (B,), some of them as variants: uint8 (B, 1, 28, 28)."""
        images = self.split.images[index]
        if self.variants is None:
            return images
        drawn, probability = self.variants
        r = torch.rand(len(index), generator=generator).to(index.device)
        return torch.where((r < probability[index]).view(-1, 1, 1, 1), drawn[index], images)


def augment(images: Tensor, recipe: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Change images float (N, 1, 28, 28), ink 1, at random, each in its own way.

    Add your own here. torchvision's transforms would change all N alike. So draw one number for
    each image: `torch.rand(len(images), generator=generator)`.
    """
    u = torch.rand(len(images), 6, generator=generator) * 2 - 1
    matrices = affine_matrices(
        angle=recipe["rotation"] * u[:, 0],
        translate=recipe["translate"] * IMAGE_SIZE * u[:, 1:3],
        scale=1 + recipe["scale"] * u[:, 3],
        shear=recipe["shear"] * u[:, 4:],
    )
    shifts = recipe["elastic"] * torch.randn(len(images), 2, ELASTIC_GRID**2, generator=generator)
    device = images.device
    return warp(images, matrices.to(device), shifts.to(device), grid_basis(device))


def affine_matrices(angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Inverse maps for `F.affine_grid`, (N, 2, 3), with the meaning of torchvision's `affine`.

    `angle` (N,) in degrees, clockwise; `translate` (N, 2) in pixels right and down; `scale` (N,)
    as a factor; `shear` (N, 2) in degrees, along x and along y.
    """
    angle = torch.deg2rad(angle)
    shear_x, shear_y = torch.deg2rad(shear).unbind(1)
    # [[a, b], [c, d]] is rotation after shear, as torchvision's. Its determinant is 1.
    a = torch.cos(angle - shear_y) / torch.cos(shear_y)
    b = -a * torch.tan(shear_x) - torch.sin(angle)
    c = torch.sin(angle - shear_y) / torch.cos(shear_y)
    d = -c * torch.tan(shear_x) + torch.cos(angle)
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    offset = -(inverse @ (translate * 2 / IMAGE_SIZE).unsqueeze(2))  # in half images
    return torch.cat([inverse, offset], 2)


@functools.lru_cache
def grid_basis(device: torch.device) -> Tensor:
    """For `warp`, (3 + K * K, 784): rows x, y and 1, then each control point's bicubic weights.

    The weights turn pixels into the unit of `F.affine_grid`, half an image.
    """
    k = ELASTIC_GRID
    size = [1, 1, IMAGE_SIZE, IMAGE_SIZE]
    xy = F.affine_grid(torch.eye(2, 3).unsqueeze(0), size, align_corners=False).view(-1, 2).t()
    weights = F.interpolate(torch.eye(k * k).view(k * k, 1, k, k), IMAGE_SIZE, mode="bicubic")
    weights = weights.view(k * k, -1) * 2 / IMAGE_SIZE
    return torch.cat([xy, torch.ones_like(xy[:1]), weights]).to(device)


def warp(images: Tensor, matrices: Tensor, shifts: Tensor, basis: Tensor) -> Tensor:
    """Transform images float (N, 1, 28, 28) by inverse maps `matrices` (N, 2, 3); 0 outside.

    `shifts` (N, 2, K * K) are of the control points, in pixels. The product with `basis` is
    `F.affine_grid` plus the interpolated shifts, 15 times as fast on a CPU.
    """
    grid = torch.cat([matrices, shifts], 2).flatten(0, 1) @ basis
    grid = grid.view(-1, 2, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- Optimiser, schedule, prediction ---

SURE = 0.99  # answers of a higher probability count as sure


def make_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """SGD with Nesterov momentum. Any optimiser whose step needs no closure will do."""
    return SGD(
        model.parameters(), lr, momentum,
        weight_decay=weight_decay, nesterov=momentum > 0, fused=True,
    )


def make_schedule(
    optimizer: Optimizer, lr: float, peak_lr: float, warmup: float, steps: int
) -> LRScheduler:
    """One cycle (Smith & Topin, 2018). Any schedule will do whose `step()` needs no metric.

    `step()` is called after each of the `steps` updates. In the first `warmup * steps` the rate
    rises along half a cosine from `lr` to `peak_lr`. Then it falls along another, to be 0 one step
    after the last. UserError if `lr` is above `peak_lr`.
    """
    if lr > peak_lr:
        raise UserError(f"--lr {lr} is above --peak-lr {peak_lr}")
    # OneCycleLR divides by its peak step, pct_start * total_steps - 1. No warmup: -1, not 0.
    return OneCycleLR(
        optimizer, peak_lr, total_steps=steps + 1,
        pct_start=(warmup * steps + 1) / (steps + 1) if warmup else 0.0,
        div_factor=peak_lr / lr, final_div_factor=math.inf, cycle_momentum=False,
    )


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, tta: bool = False) -> Tensor:
    """Logits float (N, 10) for uint8 images (N, 1, 28, 28). Puts `model` into eval mode.

    With `tta` (test-time augmentation) it looks nine times at each image whose highest probability
    is below SURE: as it is, and moved by a pixel along x, y or both. The probabilities are added.
    """
    model.eval()
    logits = torch.cat([model(batch / 255) for batch in images.split(500)])
    if tta:
        unsure = logits.softmax(1).amax(1) < SURE
        padded = F.pad(images[unsure], [1] * 4)
        looks = padded.unfold(2, IMAGE_SIZE, 1).unfold(3, IMAGE_SIZE, 1)  # (N, 1, 3, 3, 28, 28)
        log_p = [predict(model, look).log_softmax(1) for look in looks.flatten(2, 3).unbind(2)]
        logits[unsure] = torch.stack(log_p).logsumexp(0)
    return logits


def measure(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The "loss" (cross-entropy) and the "accuracy" (0 to 1) of `logits` (N, 10)."""
    accuracy = (logits.argmax(1) == labels).sum().item() / len(labels)
    return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}


def confusion_matrix(predictions: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 (10, 10): row is the true class, column the predicted one."""
    classes = len(CLASS_NAMES)
    pairs = torch.bincount(labels * classes + predictions, minlength=classes**2)
    return pairs.view(classes, classes)


# --- Files ---


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError for an OSError in writing `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` at the end; UserError if that fails."""
    target = path.resolve()  # a link stays, and what it points to is replaced
    temporary = target.parent / f".{target.name}.tmp"
    with writing(path):
        try:
            if target.exists() and not target.is_file():
                raise OSError("not an ordinary file")  # /dev/null would become one
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for a training; UserError if another has. Windows has no locks."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another training writes to {folder}; choose another --out") from error
    except OSError as error:  # some network drives
        say("warning", f"{folder} cannot be locked ({error.strerror}): start no second training")
    try:
        yield
    finally:
        os.close(handle)


# --- Checkpoints ---


def fingerprint(model: nn.Module) -> Tensor:
    """The logits (10,) of `model` for one fixed image. They tell if model.py has been changed."""
    image = torch.linspace(0, 99, IMAGE_SIZE**2).sin().abs().view(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        return copy.deepcopy(model).cpu().eval()(image)[0]


def save_checkpoint(path: Path, model: nn.Module, **contents: Any) -> None:
    """Write the weights of `model`, its fingerprint, and `contents`."""
    weights = {name: weight.cpu().contiguous() for name, weight in model.state_dict().items()}
    buffer = io.BytesIO()  # on a full disk torch.save raises a RuntimeError that names no file
    torch.save({"model": weights, "fingerprint": fingerprint(model), **contents}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def check_same(path: Path, stored: dict[str, Any], recipe: dict[str, Any]) -> None:
    """UserError if `recipe` is not the `stored` one of `path`; only teachers' paths may change."""
    names = (stored.keys() | recipe.keys()) - {"teacher"}
    changed = [name for name in sorted(names) if stored.get(name) != recipe.get(name)]
    if changed:
        made = " ".join(f"--{name.replace('_', '-')} {stored.get(name)}" for name in changed)
        made = re.sub(r"[\[\],]", "", made)  # [1, 2] as 1 2
        raise UserError(f"{path} was made with {made}: --resume cannot change that; leave the flag "
                        "out, or train into another --out")


def find_runs(path: Path) -> list[Path]:
    """The checkpoints at `path`: the file itself, or PATH/model.pt, or those of PATH/*/model.pt.

    If there is none, a UserError says what there is.
    """
    if path.is_file():
        return [path]
    folder = path.parent
    if path.is_dir():
        if found := sorted(path.glob("model.pt")) or sorted(path.glob("*/model.pt")):
            return found
        folder, path = path, path / "model.pt"
    hint = "`python train.py` makes one"
    if others := sorted([*folder.glob("*.pt"), *folder.glob("*/*.pt")]):
        hint = f"there is {others[0]}"
        if others[0].name == "last.pt":
            hint += ", not finished: its command with --resume goes on"
    raise UserError(f"there is no {path}; {hint}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in a file, with its "path"; no code in it is run. UserError if damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = {"model", "fingerprint", "recipe", "history", "metrics", "data_crc"}
        if missing := parts - checkpoint.keys():
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
    except Exception as error:  # a damaged file makes zipfile and torch.load raise nearly anything
        why = one_line(error)
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({why})") from error
    return {**checkpoint, "path": path}


def load_model(path: str | Path, device: str | torch.device) -> tuple[Net, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on `device`, and the checkpoint with its "path".

    `path` may be a run's folder. UserError if the file is damaged, or model.py has been changed.
    """
    found, *others = find_runs(Path(path))
    if others:
        names = ", ".join(run.parent.name for run in (found, *others))
        raise UserError(f"{path} holds several runs ({names}): name one of these folders")
    checkpoint = load_checkpoint(found)
    try:
        recipe = checkpoint["recipe"]
        model = Net(width=recipe["width"], activation=recipe["activation"])
        model.load_state_dict(checkpoint["model"])
        is_same = torch.allclose(
            fingerprint(model), checkpoint["fingerprint"], rtol=1e-3, atol=0.01
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = one_line(error)
        raise UserError(f"{found} holds another network than model.py ({why})") from error
    if not is_same:
        raise UserError(f"model.py computes something else than the network that wrote {found}")
    return to_device(model, torch.device(device)).eval(), checkpoint
