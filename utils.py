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
SPLITS = {"test": "test", "val": "validation", "train": "training"}  # --split, and their names

# --- Errors and flags -----------------------------------------------------------------------------


class UserError(Exception):
    """An error the user can mend, shown as one line: what is wrong, and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help tells the defaults."""

    def __init__(self, description: str) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def error(self, message: str) -> None:
        raise UserError(message)


def run_script(main: Callable[[], int | None]) -> None:
    """Exit with the status of `main`. A UserError is one line on stderr and status 2."""
    torch.set_num_threads(1)  # more are slower as soon as anything else runs
    with contextlib.suppress(ValueError):  # only the main thread can set signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # some file names cannot be printed
    try:
        status = main()
        print(end="", flush=True)
    except UserError as error:
        status = 2
        say("error", str(error))
    except KeyboardInterrupt:
        status = 130
        print("Stopped.", file=sys.stderr)
    except BrokenPipeError:  # `python test_model.py | head`
        status = 1
        sys.stdout = None  # Python would write the rest at exit, and fail again
    except OSError as error:
        if error.filename is not None:
            raise
        status = 2
        sys.stdout = None
        say("error", f"cannot write the output: {error.strerror}")  # a full disk
    sys.exit(status)


def say(kind: str, message: str) -> None:
    """Print an "error" or a "warning" on stderr, as argparse does."""
    print(f"{Path(sys.argv[0]).name}: {kind}: {message}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """The message of `error` in one line of at most 150 characters, without PyTorch's colours."""
    return " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())[:150]


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            span = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {name} {span}")
        return value

    return parse


def default_data_dir() -> Path:
    """$MNIST_DATA_DIR, else the MNIST of this repository."""
    return Path(os.environ.get("MNIST_DATA_DIR") or ROOT / "data")


def add_common_flags(parser: Parser) -> None:
    """--data-dir and --device, the same in all three scripts."""
    add = parser.add_argument
    add("--data-dir", type=Path, default=default_data_dir(), metavar="DIR",
        help="folder of a data set in MNIST's format")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda if it works, else cpu; mps is untested")  # fmt: skip


def add_checkpoint_flags(parser: Parser) -> None:
    """--checkpoint, --split and --tta, for the two scripts that read a checkpoint."""
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("checkpoints"), metavar="PATH",
        help="weights written by train.py, or the folder that holds them")  # fmt: skip
    add("--split", choices=tuple(SPLITS), default="test",
        help="images to read: the test set, those held out from training, or the training images")
    add("--tta", action="store_true",
        help="test-time augmentation: look nine times where one look is not sure")  # fmt: skip


def refuse_unused(parser: Parser, args: argparse.Namespace, name: str, others: list[str]) -> None:
    """UserError if --`name` is given together with one of `others`, which it would ignore."""
    for other in others:
        if getattr(args, name) and getattr(args, other) != parser.get_default(other):
            raise UserError(f"--{name} does not go with --{other.replace('_', '-')}")


# --- Device and seeds -----------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device called `name`, after a trial; UserError if it cannot be used.

    "auto" is cuda, or the CPU with a warning if there is a GPU that cannot be used.
    """
    wanted = name
    if name == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=wanted).add(1).item()
    except (AssertionError, RuntimeError) as error:  # no such device, or too old, full, taken
        if name != "auto":
            raise UserError(f"--device {name}: {one_line(error)}; try --device cpu") from error
        say("warning", f"the GPU cannot be used, the CPU is: {one_line(error)}")
        wanted = "cpu"
    return torch.device(wanted)


def to_device(model: Net, device: torch.device) -> Net:
    """Move `model` to `device`. A CPU is fastest with channels-last memory."""
    is_cpu = device.type == "cpu"
    return model.to(
        device, memory_format=torch.channels_last if is_cpu else torch.contiguous_format
    )


SPLIT, DROPOUT, WEIGHTS, VARIANTS, ORDER = range(5)  # uses of random numbers


def derive_seed(use: int, seed: int = 0, epoch: int = 0) -> int:
    """A 32-bit seed for one `use`. No two start the same numbers, as seed + epoch would."""
    return int(np.random.SeedSequence((seed, epoch, use)).generate_state(1)[0])


# --- Data -----------------------------------------------------------------------------------------


@dataclass
class Split:
    """Images uint8 (N, 1, 28, 28), 0 to 255, and labels int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor | slice) -> Split:
        """The images and labels at `index`: indices, a mask or a slice."""
        return Split(self.images[index], self.labels[index])


def load_mnist(data_dir: Path, train: bool, device: torch.device) -> Split:
    """The training or the test images of the data set in `data_dir`, on `device`.

    Raises UserError for files that are missing or damaged, or do not fit the network.
    """
    image_file = find_idx(data_dir, train, "images")
    label_file = find_idx(data_dir, train, "labels")
    images = read_idx(image_file)
    labels = read_idx(label_file)
    shape = " x ".join(map(str, images.shape))
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f"{image_file} has the shape {shape}, and IMAGE_SIZE = {IMAGE_SIZE} "
                        "(in model.py)")  # fmt: skip
    if images.max() <= 1:
        raise UserError(f"{image_file} has pixels up to {images.max()}; multiply them by 255")
    if labels.shape != images.shape[:1]:
        shapes = " x ".join(map(str, labels.shape))
        raise UserError(f"{label_file} has the shape {shapes}; {image_file.name} needs one number "
                        f"for each of its {len(images)} images")  # fmt: skip
    if labels.max() >= len(CLASS_NAMES):
        raise UserError(f"{label_file} has labels up to {labels.max()}, and CLASS_NAMES has "
                        f"{len(CLASS_NAMES)} names (in model.py)")  # fmt: skip
    if image_file.name.startswith("emnist"):
        say("warning", f"{image_file.name}: EMNIST's images are transposed; they are turned")
        images = images.mT.contiguous()
    return Split(images.unsqueeze(1).to(device), labels.long().to(device))


def find_idx(data_dir: Path, train: bool, kind: str) -> Path:
    """The file of the "images" or "labels", packed or not.

    The first of these folders that has one counts: MNIST/raw, `data_dir`, those in it, and those
    in them. UserError if there is none, or if there are several.
    """
    names = [f"train-{kind}"] if train else [f"t10k-{kind}", f"test-{kind}"]
    for folders in ("MNIST/raw", ".", "*", "*/*"):
        found = {}  # a file and its packed twin count once
        for path in sorted(data_dir.glob(f"{folders}/*ubyte*")):
            if path.is_file() and any(name in path.name for name in names):
                found[str(path).replace(".gz", "")] = path
        if len(found) > 1:
            several = ", ".join(map(str, found.values()))
            raise UserError(f"--data-dir {data_dir} holds several data sets ({several}): name one")
        if found:
            return found.popitem()[1]
    dims = 3 if kind == "images" else 1
    raise UserError(f"no file {names[0]}-idx{dims}-ubyte in {data_dir} or the folders in it; "
                    "without --data-dir the MNIST of this repository is read")  # fmt: skip


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an IDX file (the format of LeCun's MNIST page), packed or not.

    Reads only as much as the header declares. Raises UserError if the file is damaged.
    """
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            zeros, kind, dims = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            size = math.prod(shape)
            if zeros != 0 or size == 0:
                raise ValueError("its header is not that of an IDX file")
            if kind != 8:
                raise ValueError(f"its numbers are of type {kind:#04x}, and 0x08 (uint8) is needed")
            data = bytearray(file.read(size + 1))  # gzip compares its checksum at the end
    except (OSError, EOFError, MemoryError, OverflowError, ValueError, struct.error) as error:
        raise UserError(f"{path} is damaged or not an IDX file: {error}") from error
    except zlib.error as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if len(data) != size:
        declared = " x ".join(map(str, shape))
        what = "truncated" if len(data) < size else "too long"
        raise UserError(f"{path} is {what}: its header declares {declared} values")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def checksum(split: Split) -> int:
    """A checksum of images and labels: the held-out images depend on both."""
    return zlib.crc32(split.labels.cpu().numpy(), zlib.crc32(split.images.cpu().numpy()))


def make_splits(everything: Split, recipe: dict[str, Any]) -> tuple[Split, Split | None]:
    """The images to train on, and those held out, or None: "val_size", or the "fold" of "folds".

    With a "train_size" only so many of the others are trained on. All are stratified, and always
    the same images. Folds are disjoint, and together the whole. UserError if they ask for too many.
    """
    folds = recipe["folds"]
    count = len(everything)
    too_many = f"--train-size, --val-size or --folds ask for too many of {count:,} images"
    if max(recipe["val_size"], 10 * folds) >= count:
        raise UserError(too_many)
    generator = torch.Generator().manual_seed(derive_seed(SPLIT))
    shuffled = torch.randperm(count, generator=generator)
    by_class = shuffled[everything.labels.cpu()[shuffled].argsort(stable=True)]
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
    val_split = everything.select(held_out.sort().values.to(device))
    return train_split, val_split if len(val_split) else None


def pick_evenly(index: Tensor, size: int) -> Tensor:
    """`size` elements of `index` (N,) at equal distances: if sorted by class, as many of each."""
    return index[(torch.arange(size) * len(index) + len(index) // 2) // max(size, 1)]


def load_split(
    name: str, data_dir: Path, checkpoint: dict[str, Any], device: torch.device
) -> Split:
    """The "test", "val" or "train" images of the training that wrote `checkpoint`, as they are.

    UserError if the training held out none, or had other images than those in `data_dir`.
    """
    if name == "test":
        return load_mnist(data_dir, train=False, device=device)
    everything = load_mnist(data_dir, train=True, device=device)
    if checksum(everything) != checkpoint["data_crc"]:
        raise UserError(f"--split {name}: {data_dir} has other training images or labels than "
                        "this checkpoint was trained on")  # fmt: skip
    train_split, val_split = make_splits(everything, checkpoint["recipe"])
    if name == "train":
        return train_split
    if val_split is None:
        raise UserError("--split val: this training held out no images; train with --val-size")
    return val_split


# --- Batches and augmentation ---------------------------------------------------------------------

PASSES_PER_EPOCH = 3  # after the first epoch; each pass is over a third of the images
CHUNK = 1024  # images to augment at once: few calls, and the result fits a CPU's cache
ELASTIC_GRID = 5  # K: control points of the elastic distortion along each side


class Loader:
    """Shuffled, augmented batches of the training images `split`.

    The first epoch shows each image once. After it most images have a loss near zero and teach
    little. So each later epoch has three passes, each over a third of the images: the
    "hard_fraction" of it has the largest losses, the rest is drawn at random (after Jiang et al.,
    "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019). The training loop keeps
    the last loss of each image in `losses` (N,).

    `variants`: images uint8 (N, 1, 28, 28), and the probability (N,) of each to be shown instead of
    the one in `split`.
    """

    def __init__(
        self,
        split: Split,
        recipe: dict[str, Any],
        variants: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.split = split
        self.recipe = recipe
        self.variants = variants
        self.losses = torch.zeros(len(split), device=split.labels.device)
        self.count = len(split)  # images in an epoch
        if self.count % recipe["batch_size"] == 1 and self.count > 1:
            self.count -= 1  # nn.BatchNorm1d, in a network of yours, cannot train on one image

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self.count / self.recipe["batch_size"])

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of epoch `number`, from 0: images float (B, 1, 28, 28), labels (B,), index (B,).

        They depend on `number`, `losses` and what the loader was made of, and on nothing else.
        """
        seed = derive_seed(ORDER, self.recipe["seed"], number)
        generator = torch.Generator().manual_seed(seed)
        batch_size = self.recipe["batch_size"]
        chunk = batch_size * max(1, CHUNK // batch_size)
        hard = number > 0 and self.recipe["hard_fraction"] > 0
        passes = min(PASSES_PER_EPOCH, len(self)) if hard else 1
        ends = [len(self) * i // passes * batch_size for i in range(1, passes)]
        shown = 0
        for end in [*ends, self.count]:
            for index in self.choose(end - shown, generator).split(chunk):
                images = augment(self.pictures(index, generator) / 255, self.recipe, generator)
                batches = images, self.split.labels[index], index
                yield from zip(*(part.split(batch_size) for part in batches))
            shown = end

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """Shuffled indices (count,), all different, the hard images among them."""
        priority = torch.rand(len(self.losses), generator=generator)
        hardest = self.losses.topk(int(self.recipe["hard_fraction"] * count)).indices
        priority[hardest.cpu()] += 1
        chosen = priority.topk(count).indices
        return chosen[torch.randperm(count, generator=generator)].to(self.losses.device)

    def pictures(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """The images at `index` (B,), or their variants: uint8 (B, 1, 28, 28)."""
        images = self.split.images[index]
        if self.variants is None:
            return images
        variants, probability = self.variants
        is_variant = torch.rand(len(index), generator=generator).to(index.device)
        is_variant = is_variant < probability[index]
        return torch.where(is_variant.view(-1, 1, 1, 1), variants[index], images)


def augment(images: Tensor, recipe: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Change images at random, each in its own way: float (N, 1, 28, 28), ink 1, to the same.

    Add your own here. N is about 1,000, and torchvision's transforms draw one random number for
    all N. So draw N of them, as `torch.rand(len(images), generator=generator)` does.
    """
    u = torch.rand(len(images), 6, generator=generator) * 2 - 1
    matrices = affine_matrices(
        angle=recipe["rotation"] * u[:, 0],
        translate=recipe["translate"] * IMAGE_SIZE * u[:, 1:3],
        scale=1 + recipe["scale"] * u[:, 3],
        shear=recipe["shear"] * u[:, 4:],
    )
    bends = recipe["elastic"] * torch.randn(len(images), 2, ELASTIC_GRID**2, generator=generator)
    device = images.device
    return warp(images, matrices.to(device), bends.to(device), grid_basis(device))


def affine_matrices(angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Inverse maps for `F.affine_grid`, (N, 2, 3), with the meaning of torchvision's `affine`.

    `angle` (N,) in degrees, clockwise; `translate` (N, 2) in pixels right and down; `scale` (N,)
    as a factor; `shear` (N, 2) in degrees, along x and along y.
    """
    angle = torch.deg2rad(angle)
    shear_x, shear_y = torch.deg2rad(shear).unbind(1)
    # Rotation after shear, as in torchvision.transforms.functional._get_inverse_affine_matrix.
    a = torch.cos(angle - shear_y) / torch.cos(shear_y)
    b = -a * torch.tan(shear_x) - torch.sin(angle)
    c = torch.sin(angle - shear_y) / torch.cos(shear_y)
    d = -c * torch.tan(shear_x) + torch.cos(angle)
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    offset = -(inverse @ (translate * 2 / IMAGE_SIZE).unsqueeze(2))  # in half images
    return torch.cat([inverse, offset], 2)


@functools.lru_cache
def grid_basis(device: torch.device) -> Tensor:
    """(3 + K * K, 784), in half images: x, y and 1 of each pixel, then each control point's bump.

    A bump is what moving a control point does to the pixels around it, by bicubic interpolation.
    """
    k = ELASTIC_GRID
    whole = [1, 1, IMAGE_SIZE, IMAGE_SIZE]
    xy = F.affine_grid(torch.eye(2, 3).unsqueeze(0), whole, align_corners=False).view(-1, 2).t()
    bumps = F.interpolate(torch.eye(k * k).view(k * k, 1, k, k), IMAGE_SIZE, mode="bicubic")
    bumps = bumps.view(k * k, -1) * 2 / IMAGE_SIZE
    return torch.cat([xy, torch.ones_like(xy[:1]), bumps]).to(device)


def warp(images: Tensor, matrices: Tensor, bends: Tensor, basis: Tensor) -> Tensor:
    """Transform float images (N, 1, 28, 28) by inverse maps `matrices` (N, 2, 3); 0 outside.

    `bends` (N, 2, K * K) move the control points, in pixels. This is `F.affine_grid` and
    `F.grid_sample`. One product with `grid_basis` makes the grid 15 times as fast on a CPU.
    """
    grid = torch.cat([matrices, bends], 2).flatten(0, 1) @ basis
    grid = grid.view(-1, 2, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- Optimiser, schedule, prediction --------------------------------------------------------------

SURE = 0.99  # an answer of a higher probability counts as sure


def make_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """SGD with Nesterov momentum. Any optimiser whose step needs no closure will do."""
    return SGD(
        model.parameters(),
        lr,
        momentum,
        weight_decay=weight_decay,
        nesterov=momentum > 0,
        fused=True,  # one call a step
    )


def make_schedule(
    optimizer: Optimizer, lr: float, peak_lr: float, warmup: float, steps: int
) -> LRScheduler:
    """One cycle (Smith & Topin, 2018). Any schedule will do whose `step()` needs no metric.

    `step()` is called after each of the `steps`. In the first `warmup` of them (0 to 1; with 0 it
    starts at the peak) the rate rises from `lr` to `peak_lr`. Then it falls, to reach 0 one step
    after the last. Both are half a cosine. UserError if `lr` is above `peak_lr`.
    """
    if lr > peak_lr:
        raise UserError(f"--lr {lr} is above --peak-lr {peak_lr}")
    # OneCycleLR counts from 0 to total_steps - 1, and its peak is at pct_start * total_steps - 1.
    return OneCycleLR(
        optimizer,
        peak_lr,
        total_steps=steps + 1,
        pct_start=(warmup * steps + 1) / (steps + 1) if warmup else 0.0,
        div_factor=peak_lr / lr,
        final_div_factor=math.inf,
        cycle_momentum=False,
    )


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, tta: bool = False) -> Tensor:
    """Logits float (N, 10) for uint8 images (N, 1, 28, 28). Puts `model` into eval mode.

    With `tta` (test-time augmentation) it looks nine times at each image that it reads with less
    than SURE: at its place, and moved by a pixel along x, y or both. The probabilities are added.
    """
    model.eval()
    logits = torch.cat([model(batch / 255) for batch in images.split(500)])
    if tta:
        unsure = logits.softmax(1).amax(1) < SURE
        padded = F.pad(images[unsure], [1] * 4)
        looks = [
            padded[..., y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y in range(3) for x in range(3)
        ]
        each = torch.stack([predict(model, look).log_softmax(1) for look in looks])
        logits[unsure] = each.logsumexp(0)
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


# --- Files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what happens to `path` while it is written into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, to be `path` at the end; UserError if that fails."""
    target = path.resolve()  # a link stays, and what it points to is replaced
    temporary = target.parent / f".{target.name}.tmp"  # what a killed process left is overwritten
    with writing(path):
        try:
            if target.exists() and not target.is_file():
                raise OSError("not an ordinary file")  # such as /dev/null, which root could replace
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for a training; UserError if another one has. Windows has no such locks."""
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
    except OSError as error:  # some network file systems
        say("warning", f"{folder} cannot be locked ({error.strerror}); start no second training")
    try:
        yield
    finally:
        os.close(handle)


# --- Checkpoints ----------------------------------------------------------------------------------


def answer(model: nn.Module) -> Tensor:
    """The logits (10,) of `model` for one fixed image: equal weights do not make equal networks."""
    image = torch.linspace(0, 99, IMAGE_SIZE**2).sin().abs()
    with torch.inference_mode():
        on_cpu = copy.deepcopy(model).cpu().eval()
        return on_cpu(image.view(1, 1, IMAGE_SIZE, IMAGE_SIZE))[0].clone()


def save_checkpoint(path: Path, model: nn.Module, **contents: Any) -> None:
    """Write the weights of `model`, its answer and `contents`, atomically."""
    weights = {name: weight.cpu().contiguous() for name, weight in model.state_dict().items()}
    buffer = io.BytesIO()  # torch.save to a full disk raises a RuntimeError that names no file
    torch.save({"model": weights, "answer": answer(model), **contents}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def check_same(path: Path, stored: dict[str, Any], recipe: dict[str, Any]) -> None:
    """UserError that names the settings of `stored`, the recipe in `path`, which `recipe` changes.

    Teachers may have moved, so they are compared by their weights elsewhere.
    """
    if stored.keys() != recipe.keys():
        raise UserError(f"{path} cannot be resumed, it is of another version of train.py")
    changed = [name for name in stored if stored[name] != recipe[name] and name != "teacher"]
    if changed:
        made = " ".join(f"--{name} {typed(stored[name])}" for name in changed).replace("_", "-")
        raise UserError(f"{path} was made with {made}: --resume cannot change that, nor the cycle "
                        "of its learning rate; leave the flag out, or train anew into another "
                        "--out, where this network may be the --teacher")  # fmt: skip


def typed(value: Any) -> str:
    """A setting as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def find_runs(path: Path) -> list[Path]:
    """`path`, or if it is a folder its model.pt, or else that of each folder in it.

    Raises UserError if there is none, which says what there is instead.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        if found := sorted(path.glob("model.pt")) or sorted(path.glob("*/model.pt")):
            return found
        path = path / "model.pt"
    others = sorted([*path.parent.glob("*.pt"), *path.parent.glob("*/*.pt")])
    hint = "`python train.py` makes one"
    if others:
        hint = f"there is {', '.join(map(str, others[:3]))}"
    if others and others[0].name == "last.pt":
        hint += ", of a training that is not finished: go on with it by " \
                f"`python train.py --resume --out {others[0].parent}`"  # fmt: skip
    raise UserError(f"there is no {path}; {hint}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of train.py, without running code from it, and add its "path".

    Raises UserError if it is missing or damaged.
    """
    (path,) = find_runs(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = {"model", "answer", "recipe", "history", "metrics", "data_crc"}
        if missing := parts - checkpoint.keys():
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file makes zipfile and torch.load raise nearly anything
        why = one_line(error)
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({why})") from error
    return {**checkpoint, "path": path}


def load_model(path: str | Path, device: str | torch.device) -> tuple[Net, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on `device`, and the checkpoint with its "path".

    `path` may be the folder of a run. Raises UserError as `load_checkpoint` does, and if model.py
    holds another network.
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
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = one_line(error)
        raise UserError(f"{found} holds another network than model.py ({why})") from error
    if not torch.allclose(answer(model), checkpoint["answer"], rtol=1e-3, atol=0.01):
        raise UserError(f"model.py computes something else than the network that wrote {found}")
    return to_device(model, torch.device(device)).eval(), checkpoint
