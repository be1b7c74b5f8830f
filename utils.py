"""What the scripts share: flags, devices, data and augmentation, optimiser and schedule, prediction, checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import io
import json
import math
import os
import platform
import re
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from model import CLASSES, IMAGE_SIZE, Net

NO_DATA_HINT = "leave out --data-dir for the MNIST of this repository"
ROOT = Path(__file__).resolve().parent
SURE = 0.99  # an answer of a higher probability counts as sure
SPLITS = {"test": "test", "val": "validation", "train": "training"}  # the values of --split, and their names
SPLIT_SETTINGS = ("train_size", "val_size", "folds", "fold")  # settings of a recipe for make_splits
ARCHITECTURE = ("width", "activation", "adaptive_pool", "dropout", "fc_dropout")  # settings of a recipe for Net
PASSES_PER_EPOCH = 3  # after the first epoch; each pass is over a third of the images
CHUNK = 1024  # images to augment at once: few calls, and the result fits a CPU's cache
ELASTIC_GRID = 5  # K: control points of the elastic distortion along each side


# --- Errors, flags, devices, seeds ------------------------------------------------------------------------------------


class UserError(Exception):
    """An error the user can fix, shown as one line: what is wrong, and what to do."""


def run_script(main: Callable[[], int | None]) -> None:
    """Exit with the status of `main`. A UserError or an OSError is one line on stderr and status 2."""
    torch.set_num_threads(1)  # more are slower as soon as anything else runs
    with contextlib.suppress(ValueError):  # only the main thread can set signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what cannot be printed
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
        sys.stdout, status = None, 1  # with a stdout Python would write the rest at exit, and fail again
    except OSError as error:  # a full disk
        sys.stdout, status = None, 2
        say("error", f"{error.filename or 'output'}: {error.strerror or error}")
    sys.exit(status)


def say(kind: str, message: str) -> None:
    """Print `message` on stderr, as argparse prints its errors; `kind` is "error" or "warning"."""
    print(f"{Path(sys.argv[0]).name}: {kind}: {message}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """The message of `error` in one line of at most 150 characters, without PyTorch's colours."""
    return " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())[:150]


def positive(text: str) -> int:
    """An argparse type: a whole number, 1 or larger."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """--data-dir and --device, the same in all three scripts."""
    default = Path(os.environ.get("MNIST_DATA_DIR") or ROOT / "data")
    parser.add_argument("--data-dir", type=Path, default=default, metavar="DIR",
        help="folder of a data set in MNIST's format; into an empty folder MNIST is downloaded "
        "(default: $MNIST_DATA_DIR, else the MNIST of this repository)")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda if there is one, else cpu; mps is untested (default: %(default)s)")  # fmt: skip


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --split and --tta, for the two scripts that read a checkpoint."""
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints"), metavar="PATH",
        help="weights written by train.py, or the folder that holds them (default: %(default)s)")  # fmt: skip
    parser.add_argument("--split", choices=tuple(SPLITS), default="test",
        help="images to read: the test set, the images held out from training (--val-size, --folds), "
        "or the training images (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tta", action="store_true",
        help="test-time augmentation: look nine times at a digit that one look is not sure of")  # fmt: skip


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, others: Sequence[str]) -> None:
    """UserError if `args` has a value for --`name` and for one of `others`, which it would ignore."""
    for other in others:
        if getattr(args, name) and getattr(args, other) != parser.get_default(other):
            raise UserError(f"--{name} does not go with --{other.replace('_', '-')}")


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda if there is one, else cpu. UserError for a device that is absent."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(device for device in ("cuda", "cpu") if present[device]) if name == "auto" else name
    if not present[name]:
        raise UserError(f"--device {name}: this machine or this build of PyTorch has none; try --device auto")
    return torch.device(name)


def to_device(model: Net, device: torch.device) -> Net:
    """Move `model` to `device`. On a CPU, convolutions and pooling are fastest in channels-last memory."""
    return model.to(device, memory_format=torch.channels_last if device.type == "cpu" else torch.contiguous_format)


ORDER, DROPOUT, WEIGHTS, REPLACEMENTS = range(4)  # what random numbers are used for; ORDER includes augmentation


def derive_seed(seed: int, epoch: int = 0, use: int = ORDER) -> int:
    """A 64-bit seed from seed, epoch and use. No two start the same random numbers, as seed + epoch would."""
    return int(np.random.SeedSequence((seed, epoch, use)).generate_state(1, np.uint64)[0])


# --- Data -------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Images uint8 (N, 1, 28, 28), 0 to 255, and labels int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def select(self, index: Tensor | slice) -> Split:
        """The images and labels at `index`: indices, a mask or a slice."""
        return Split(self.images[index], self.labels[index])


def load_mnist(data_dir: Path, train: bool, device: torch.device) -> Split:
    """The training or the test split of the data set in `data_dir`, as one tensor on `device`.

    torchvision downloads MNIST if there is no file in the folder. Raises UserError for files that are missing or
    damaged, or do not fit the network.
    """
    if not any(path.is_file() for path in data_dir.rglob("*")):
        download_mnist(data_dir)
    part = "train" if train else "t10k|test"
    image_file, label_file = find_idx(data_dir, f"({part})-images"), find_idx(data_dir, f"({part})-labels")
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        shape = " x ".join(map(str, images.shape))
        raise UserError(f"{image_file} holds {shape} values, not images of IMAGE_SIZE = {IMAGE_SIZE} (in model.py)")
    if images.max() <= 1:
        raise UserError(f"{image_file} has pixels from 0 to {images.max()}; multiply them by 255")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{image_file} has {len(images)} images, but {label_file} {len(labels)} labels")
    if (most := int(labels.max())) >= CLASSES:
        raise UserError(f"{label_file} has labels up to {most}, and CLASSES = {CLASSES} (in model.py)")
    if image_file.name.startswith("emnist"):
        print(f"{image_file.name}: EMNIST stores its images transposed; they are turned", file=sys.stderr)
        images = images.mT.contiguous()
    return Split(images.unsqueeze(1).to(device), labels.long().to(device))


def download_mnist(data_dir: Path) -> None:
    """Let torchvision download MNIST to `data_dir`; UserError if that fails."""
    from torchvision.datasets import MNIST  # here, because this import takes as long as PyTorch's own

    print(f"Downloading MNIST to {data_dir}", file=sys.stderr)
    try:
        MNIST(data_dir, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"no data set in {data_dir}, and no download: {one_line(error)}; {NO_DATA_HINT}") from error


def find_idx(data_dir: Path, name: str) -> Path:
    """The IDX file whose name fits the pattern `name`, in `data_dir` or up to two folders below, packed or not.

    It may have a prefix, as EMNIST's have. MNIST/raw comes first. UserError if there is none, or if there are several.
    """
    pattern = re.compile(rf"(.+-)?{name}[-.]idx[13]-ubyte(\.gz)?")
    files = [path for depth in ("*", "*/*", "*/*/*") for path in sorted(data_dir.glob(depth))]
    files = [path for path in files if pattern.fullmatch(path.name) and path.is_file()]
    mnist = [path for path in files if path.parent == data_dir / "MNIST" / "raw"]
    files = mnist or [path for path in files if len(path.parts) == len(files[0].parts)]  # the nearest
    plain = {p.parent / re.sub(r"\.gz$", "", p.name.replace(".idx", "-idx")): p for p in reversed(files)}
    if len(plain) > 1:
        raise UserError(f"--data-dir {data_dir} holds several data sets, such as {files[0]} and {files[-1]}; give one")
    if not plain:
        raise UserError(f"no file named {name}-idx…-ubyte in {data_dir} or the folders in it; {NO_DATA_HINT}")
    return next(iter(plain.values()))


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an IDX file (the format of LeCun's MNIST page), packed with gzip or not.

    Reads only as much as the header declares. Raises UserError if the file is damaged.
    """
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            zeros, kind, dims = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            size, declared = math.prod(shape), f"its header declares {' x '.join(map(str, shape))} values"
            if (zeros, kind) != (0, 8) or not shape or size == 0:
                raise ValueError(f"{declared} of kind {kind}")
            data = bytearray(file.read(size + 1))  # one more byte: gzip compares its checksum at the end
    except (OSError, EOFError, MemoryError, OverflowError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is damaged or not an IDX file: {error}") from error
    if len(data) != size:
        raise UserError(f"{path} is {'truncated' if len(data) < size else 'too long'}: {declared}")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def make_splits(everything: Split, train_size: int, val_size: int, folds: int, fold: int) -> tuple[Split, Split | None]:
    """(training images, held-out images or None): `val_size` images are held out, or fold number `fold` of `folds`.

    With a `train_size` only so many of the others are trained on. All are stratified, and always the same images. The
    folds are disjoint and together the whole. Raises UserError if there are too few images.
    """
    count = len(everything.labels)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(0)))
    by_class = shuffled[torch.argsort(everything.labels.cpu()[shuffled], stable=True)]
    held_out = by_class[fold - 1 :: folds] if folds else pick_evenly(by_class, min(val_size, count))
    rest = by_class[~torch.isin(by_class, held_out)]
    if train_size > len(rest) or max(10 * folds, val_size) >= count:
        raise UserError(f"--train-size, --val-size or --folds ask for too many of {count:,} images")
    rest = pick_evenly(rest, train_size or len(rest))
    rest, held_out = (everything.select(index.sort().values.to(everything.labels.device)) for index in (rest, held_out))
    return rest, held_out if len(held_out.labels) else None


def pick_evenly(index: Tensor, size: int) -> Tensor:
    """`size` elements of `index` (N,) at equal distances: of images sorted by class, as many of each."""
    return index[(torch.arange(size) * len(index) + len(index) // 2) // max(size, 1)]


def load_split(name: str, data_dir: Path, checkpoint: dict[str, Any], device: torch.device) -> Split:
    """The "test", "val" or "train" images of the training that wrote `checkpoint`, not augmented.

    UserError if the training held out none. Different images in `data_dir` are an error, for "test" a warning.
    """
    if name != "test" or any(data_dir.rglob("*train-images*")):
        everything = load_mnist(data_dir, train=True, device=device)
        if zlib.crc32(everything.images.cpu().numpy()) != checkpoint["data_crc"]:
            message = f"{data_dir} has other training images than this checkpoint was trained on"
            if name != "test":
                raise UserError(f"--split {name}: {message}")
            say("warning", message)
    if name == "test":
        return load_mnist(data_dir, train=False, device=device)
    rest, held_out = make_splits(everything, *(checkpoint["recipe"][key] for key in SPLIT_SETTINGS))
    if name == "val" and held_out is None:
        raise UserError("--split val: this training held out no images; train with --val-size or --folds")
    return rest if name == "train" else held_out


# --- Batches and augmentation -----------------------------------------------------------------------------------------


class Loader:
    """Shuffled, augmented batches of `split`: images float (B, 1, 28, 28), labels (B,), index (B,) in the split.

    The first epoch shows each image once. After it most images have a loss near zero and teach little. So each later
    epoch has three passes, each over a third of the images: a `hard_fraction` of it has the largest losses, the rest is
    drawn at random (after Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers",
    2019). The training loop keeps the last loss of each image in `losses` (N,). With a `hard_fraction` of 0 every epoch
    shows each image once. `replacements` are images uint8 (N, 1, 28, 28), and the probability (N,) of each to be shown
    instead of the one in `split`. An epoch depends on the arguments, its number and `losses`, and on nothing else.
    """

    def __init__(
        self, split: Split, batch_size: int, augmentation: Augmentation, seed: int, hard_fraction: float = 0.5,
        replacements: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.split, self.augmentation, self.replacements = split, augmentation, replacements
        self.seed, self.epoch, self.hard_fraction = seed, 0, hard_fraction  # set `epoch` before each epoch
        self.losses = torch.zeros(len(split.labels), device=split.labels.device)
        self.sizes = list(map(len, split.labels.split(batch_size)))
        if self.sizes[-1] == 1 < len(self.sizes):  # nn.BatchNorm1d cannot train on one image
            self.sizes[-2:] = [batch_size + 1]
        together = max(1, CHUNK // batch_size)
        self.chunks = [self.sizes[i : i + together] for i in range(0, len(self.sizes), together)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        passes = PASSES_PER_EPOCH if self.epoch and self.hard_fraction else 1
        length = math.ceil(len(self.chunks) / passes)
        for start in range(0, len(self.chunks), length):
            chunks = self.chunks[start : start + length]
            order = self.choose(sum(map(sum, chunks)), generator)  # by the losses after the last pass
            for sizes, index in zip(chunks, order.split([sum(sizes) for sizes in chunks])):
                images = self.split.images[index]
                if self.replacements:
                    others, probability = self.replacements
                    replaced = torch.rand(len(index), generator=generator).to(index.device) < probability[index]
                    images = torch.where(replaced.view(-1, 1, 1, 1), others[index], images)
                images = augment(images / 255, self.augmentation, generator)
                yield from zip(images.split(sizes), self.split.labels[index].split(sizes), index.split(sizes))

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """Shuffled indices (count,), all different: `hard_fraction` of them have the largest losses."""
        priority = torch.rand(len(self.losses), generator=generator)
        priority[self.losses.topk(int(self.hard_fraction * count)).indices.cpu()] += 1
        chosen = priority.topk(count).indices
        return chosen[torch.randperm(count, generator=generator)].to(self.losses.device)


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Change training images at random, each in its own way: float (N, 1, 28, 28), ink 1, paper 0, to the same.

    Add your own here. N is about 1,000, and torchvision's transforms draw one random number for all N. So draw N
    numbers from `generator`, as `torch.rand(len(images), generator=generator)` does.
    """
    rotation, scale, translate, shear, elastic = augmentation
    u = torch.rand(len(images), 6, generator=generator) * 2 - 1
    translation = translate * IMAGE_SIZE * u[:, 1:3]
    matrices = affine_matrices(rotation * u[:, 0], translation, 1 + scale * u[:, 3], shear * u[:, 4:])
    displacements = elastic * torch.randn(len(images), 2, ELASTIC_GRID**2, generator=generator)
    return warp(images, matrices.to(images.device), displacements.to(images.device), grid_basis(images.device))


class Augmentation(NamedTuple):
    """Ranges of the random transform of each image; with all zeros the images stay as they are."""

    rotation: float = 0.0  # degrees, either way
    scale: float = 0.0  # 0.1 is 0.9 to 1.1
    translate: float = 0.0  # fraction of the image's side, either way
    shear: float = 0.0  # degrees, either way, along x and along y
    elastic: float = 0.0  # standard deviation, in pixels, of the displacement of each control point


def affine_matrices(angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Inverse maps for `F.affine_grid`, (N, 2, 3), with the meaning of torchvision's `affine`.

    `angle` (N,) in degrees, clockwise; `translate` (N, 2) in pixels right and down; `scale` (N,) as a factor; `shear`
    (N, 2) in degrees, along x and along y.
    """
    angle, (shear_x, shear_y) = torch.deg2rad(angle), torch.deg2rad(shear).unbind(1)
    # Rotation after shear, as in torchvision.transforms.functional._get_inverse_affine_matrix.
    a = torch.cos(angle - shear_y) / torch.cos(shear_y)
    b = -a * torch.tan(shear_x) - torch.sin(angle)
    c = torch.sin(angle - shear_y) / torch.cos(shear_y)
    d = -c * torch.tan(shear_x) + torch.cos(angle)
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    offset = -(inverse @ (translate * 2 / IMAGE_SIZE).unsqueeze(2))  # affine_grid's unit is half an image
    return torch.cat([inverse, offset], 2)


@functools.lru_cache
def grid_basis(device: torch.device) -> Tensor:
    """(3 + K * K, 784): x, y and 1 of each pixel, then the bicubic bump of each control point, in half images."""
    k, whole = ELASTIC_GRID, [1, 1, IMAGE_SIZE, IMAGE_SIZE]
    xy = F.affine_grid(torch.eye(2, 3).unsqueeze(0), whole, align_corners=False).view(-1, 2).t()
    bumps = F.interpolate(torch.eye(k * k).view(k * k, 1, k, k), IMAGE_SIZE, mode="bicubic")
    return torch.cat([xy, torch.ones_like(xy[:1]), bumps.view(k * k, -1) * 2 / IMAGE_SIZE]).to(device)


def warp(images: Tensor, matrices: Tensor, displacements: Tensor, basis: Tensor) -> Tensor:
    """Transform float images (N, 1, 28, 28) by inverse maps `matrices` (N, 2, 3); bilinear, 0 outside.

    `displacements` (N, 2, K * K) of the control points, in pixels, bend the image smoothly.
    This is `F.affine_grid` and `F.grid_sample`. One product with `grid_basis` makes the grid 15 times as fast on a CPU.
    """
    grid = torch.cat([matrices, displacements], 2).flatten(0, 1) @ basis
    grid = grid.view(-1, 2, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- Optimiser, schedule, prediction ----------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """SGD with Nesterov momentum, one fused call a step. Any optimiser whose step needs no closure will do."""
    return SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0, fused=True)


def make_schedule(optimizer: Optimizer, lr: float, peak_lr: float, warmup: float, steps: int) -> LRScheduler:
    """One cycle (Smith & Topin, 2018); `step()` is called after each step. Any schedule without a metric will do.

    In the first `warmup` (0 to 1; with 0 it starts at the peak) of all `steps` the rate rises from `lr` to `peak_lr`.
    Then it falls, to reach 0 one step after the last. Both are half a cosine. UserError if `lr` is above `peak_lr`.
    """
    if lr > peak_lr:
        raise UserError(f"--lr {lr} is above --peak-lr {peak_lr}: the cycle rises from one to the other")
    # OneCycleLR counts from 0 to total_steps - 1, and its peak is at pct_start * total_steps - 1.
    pct_start = (warmup * steps + 1) / (steps + 1) if warmup else 0.0
    return OneCycleLR(
        optimizer, peak_lr, total_steps=steps + 1, pct_start=pct_start, div_factor=peak_lr / lr,
        final_div_factor=math.inf, cycle_momentum=False,
    )  # fmt: skip


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, tta: bool = False) -> Tensor:
    """Logits float (N, 10) for uint8 images (N, 1, 28, 28), both on one device. Puts `model` into eval mode.

    With `tta` (test-time augmentation) it looks nine times at each digit that it reads with less than SURE: at its
    place, and moved by a pixel along x, y or both. The probabilities of the nine looks are added.
    """
    model.eval()
    logits = torch.cat([model(batch / 255) for batch in images.split(500)])
    if tta:
        unsure = logits.softmax(1).amax(1) < SURE
        padded = F.pad(images[unsure], [1] * 4)
        looks = [padded[..., y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y in range(3) for x in range(3)]
        logits[unsure] = torch.stack([predict(model, look).log_softmax(1) for look in looks]).logsumexp(0)
    return logits


def measure(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The "loss" (cross-entropy) and the "accuracy" (0 to 1) of `logits` (N, 10)."""
    accuracy = (logits.argmax(1) == labels).sum().item() / len(labels)
    return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}


def confusion_matrix(predictions: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 (10, 10): row is the true digit, column the predicted one."""
    return torch.bincount(labels * CLASSES + predictions, minlength=CLASSES**2).view(CLASSES, CLASSES)


# --- Checkpoints and other files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, to be `path` at the end; after an error it is deleted. UserError if writing fails."""
    target = path.resolve()  # a link stays, and what it points to is replaced
    temporary = target.parent / f".{target.name}.tmp"  # of a fixed name: what a killed process left is overwritten
    try:
        if target.exists() and not target.is_file():
            raise OSError("not an ordinary file")  # such as /dev/null, which root could replace
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # after os.replace it is gone
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def save_checkpoint(path: Path, model: nn.Module, **contents: Any) -> None:
    """Write the weights of `model`, the versions and `contents`, atomically."""
    weights = {name: weight.cpu().contiguous() for name, weight in model.state_dict().items()}
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    buffer = io.BytesIO()  # torch.save to a full disk raises a RuntimeError that does not name the file
    torch.save({"model": weights, "versions": versions, **contents}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `train.py`, without running code from it. UserError if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"model", "recipe", "history", "metrics", "data_crc"} - checkpoint.keys():
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; `python train.py` makes one") from error
    except Exception as error:  # a damaged file makes zipfile and torch.load raise nearly anything
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({one_line(error)})") from error
    return checkpoint


def find_runs(path: Path) -> list[Path]:
    """`path`, or if it is a folder its model.pt, or else that of each folder in it. UserError if there is none."""
    found = sorted(path.glob("model.pt")) or sorted(path.glob("*/model.pt")) if path.is_dir() else [path]
    if not found:
        raise UserError(f"no model.pt in {path} or one folder below; `python train.py` makes one")
    return found


def load_model(path: Path, device: torch.device) -> tuple[Net, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on `device`, and the checkpoint.

    Raises UserError as `load_checkpoint` does, and if the weights are not those of the network in model.py.
    """
    path, *others = find_runs(path)
    if others:
        names = ", ".join(run.parent.name for run in (path, *others))
        raise UserError(f"{path.parent.parent} holds several runs ({names}): name one of these folders")
    checkpoint = load_checkpoint(path)
    try:
        model = Net(**{name: checkpoint["recipe"][name] for name in ARCHITECTURE})
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds another network than model.py ({one_line(error)})") from error
    return to_device(model, device).eval(), checkpoint
