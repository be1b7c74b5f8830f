"""Everything around the network: devices, data and augmentation, optimiser and schedule, checkpoints."""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import math
import os
import platform
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Net

try:
    import fcntl
except ImportError:  # Windows: two trainings into one --out are not refused there
    fcntl = None

ROOT = Path(__file__).resolve().parent
IMAGE_SIZE = 28
STD = 0.3081  # of the 60,000 training images, scaled to 0..1
MNIST_CRC32 = 4083391318  # of the same, as uint8; other images get no foreign shapes unless asked for
MAX_IMAGES = 1_000_000  # more than any data set in MNIST's format has
MAX_WIDTH = 32


# ---------------------------------------------------------------------------------------------------------------------
# Errors and flags


class UserError(Exception):
    """Something that the person at the keyboard can mend; its one-line message says what and how."""


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its status; what the machine or the user got wrong is one line on stderr, status 2."""
    torch.set_num_threads(1)  # as soon as anything else runs, a second thread costs more than it ever brings
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        status = fail(str(error))
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        status = 130
    except OSError as error:  # `python test_model.py | head`, or a log on a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has no place to go
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
        status = 1 if isinstance(error, BrokenPipeError) else fail(reason)
    sys.exit(status)


def fail(message: str) -> int:
    """One line on stderr; returns the exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return 2


def warn(message: str) -> None:
    """One line on stderr; the work goes on."""
    print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr)


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `low`."""

    def parse(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    parse.__name__ = "int"  # argparse names the type in "invalid int value"
    return parse


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """--data-dir and --device, the same in all three scripts."""
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("MNIST_DATA_DIR") or ROOT / "data"), metavar="DIR",
        help="folder with a data set in MNIST's format; MNIST is downloaded to an empty one "
        "(default: $MNIST_DATA_DIR, else the MNIST of this repository)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto takes cuda, then mps, then cpu (default: %(default)s)",
    )  # fmt: skip


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, for the two scripts that read one."""
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("checkpoints/model.pt"), metavar="PATH",
        help="weights written by train.py (default: %(default)s)",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Device and seeds


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes the fastest present. Raises UserError for one that is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        raise UserError(f"--device {name}: this machine or this build of PyTorch has none; try --device auto")
    return torch.device(name)


def place(model: Net, device: torch.device) -> Net:
    """Move `model` to `device`; a CPU computes its convolutions and pooling fastest in channels-last memory."""
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    return model.to(device, memory_format=layout)


ORDER, DROPOUT, WEIGHTS, SHAPES = range(4)  # what random numbers are drawn for; augmentation goes with the order


def derive_seed(seed: int, epoch: int = 0, use: int = ORDER) -> int:
    """One 64-bit seed for each seed, epoch and use, so that (seed 1, epoch 2) and (seed 2, epoch 1) share nothing."""
    return int(np.random.SeedSequence((seed, epoch, use)).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------------------------------------------------------------
# MNIST


class Split(NamedTuple):
    """Images uint8 (N, 1, 28, 28), 0 to 255, and labels int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def select(self, index: Tensor | slice) -> Split:
        """The images and labels at `index`, indices or flags as a tensor, or a slice."""
        return Split(self.images[index], self.labels[index])


def load_mnist(data_dir: Path, train: bool, device: torch.device) -> Split:
    """The training or the test split of the data set in `data_dir`, as one tensor on `device`.

    The four IDX files lie in `data_dir`/MNIST/raw or in `data_dir`, packed or not. A folder that is missing or
    empty is filled by torchvision's download. Raises UserError for files that are missing or not in MNIST's format.
    """
    if not data_dir.is_dir() or not any(data_dir.iterdir()):
        download_mnist(data_dir)
    part = "train" if train else "t10k"
    image_file, label_file = (find_idx(data_dir, f"{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.dim() != 3 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f"{image_file} holds {' x '.join(map(str, images.shape))} values, expected N x 28 x 28")
    if labels.dim() != 1 or labels.max() > 9:
        raise UserError(f"{label_file} holds other values than N labels from 0 to 9")
    if len(images) != len(labels):
        raise UserError(f"{image_file} has {len(images)} images, but {label_file} {len(labels)} labels")
    return Split(images.unsqueeze(1).to(device), labels.long().to(device))


def download_mnist(data_dir: Path) -> None:
    """Let torchvision fill `data_dir` with MNIST; UserError if that fails."""
    from torchvision.datasets import MNIST  # here, because this import takes as long as PyTorch's own

    print(f"Downloading MNIST to {data_dir}", file=sys.stderr)
    try:
        MNIST(data_dir, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{data_dir} held no data set, and MNIST could not be downloaded to it ({str(error).splitlines()[0]}); "
            "leave out --data-dir for the MNIST of this repository"
        ) from error


def find_idx(data_dir: Path, name: str) -> Path:
    """The IDX file called `name`, or `name`.gz, in `data_dir`/MNIST/raw or `data_dir`; UserError if there is none."""
    places = [folder / file for folder in (data_dir / "MNIST/raw", data_dir) for file in (name, f"{name}.gz")]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"no {name} or {name}.gz in {data_dir}/MNIST/raw or {data_dir}; "
        "leave out --data-dir for the MNIST of this repository"
    )


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an IDX file (the format of LeCun's MNIST page), packed with gzip or not.

    Reads no more than the header declares and MNIST's format allows. Raises UserError if the file is damaged.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zeros, kind, dims = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            size, declared = math.prod(shape), f"its header declares {' x '.join(map(str, shape))} values"
            if (zeros, kind) != (0, 8) or not 0 < size <= MAX_IMAGES * IMAGE_SIZE**2:
                raise ValueError(f"{declared} of kind {kind}")
            data = bytearray(file.read(size + 1))  # the byte more makes gzip check its own sum
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is damaged or not an IDX file: {error}") from error
    if len(data) != size:
        raise UserError(f"{path} is {'truncated' if len(data) < size else 'too long'}: {declared}")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def shuffled_by_class(labels: Tensor) -> Tensor:
    """0..N-1, class after class of `labels` (N,), within each in an order that never changes, so that runs compare."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(0)))
    return shuffled[torch.argsort(labels.cpu()[shuffled], stable=True)]


def hold_out(split: Split, size: int) -> tuple[Split, Split]:
    """Stratified (rest, held-out) with `size` images held out, 0 < size < N; always the same."""
    n, by_class = len(split.labels), shuffled_by_class(split.labels)
    return divide(split, by_class[(torch.arange(size) * n + n // 2) // size])  # evenly spaced through the classes


def fold_out(split: Split, folds: int, fold: int) -> tuple[Split, Split]:
    """Stratified (rest, fold number `fold`) of `folds` (1 to `folds`), which are disjoint and make up the whole."""
    return divide(split, shuffled_by_class(split.labels)[fold - 1 :: folds])


def divide(split: Split, index: Tensor) -> tuple[Split, Split]:
    """(the others, those at `index`), both in the order of `split`."""
    chosen = torch.zeros(len(split.labels), dtype=torch.bool)
    chosen[index] = True
    chosen = chosen.to(split.labels.device)
    return split.select(~chosen), split.select(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and augmentation


def normalize(images: Tensor) -> Tensor:
    """(..., 28, 28) with ink 1 on 0 -> the network's input, of standard deviation 1 over MNIST.

    The usual mean of 0.1307 is not subtracted: paper stays 0, as the convolutions' zero padding has it.
    """
    return images / STD


ELASTIC_GRID = 5  # K: control points of the elastic distortion along each side


class Augmentation(NamedTuple):
    """Ranges of the random transform of each image; all zeros leave the images as they are."""

    rotation: float = 0.0  # degrees, either way
    scale: float = 0.0  # 0.1 is 0.9 to 1.1
    translate: float = 0.0  # fraction of the image's side, either way
    shear: float = 0.0  # degrees, either way, along x and along y
    elastic: float = 0.0  # standard deviation, in pixels, of the displacement of each control point

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Affine matrices (n, 2, 3) and control-point displacements (n, 2, K * K) in pixels, drawn from `generator`."""
        u = torch.rand(n, 6, generator=generator) * 2 - 1
        matrices = affine_matrices(
            angle=self.rotation * u[:, 0],
            translate=self.translate * IMAGE_SIZE * u[:, 1:3],
            scale=1 + self.scale * u[:, 3],
            shear=self.shear * u[:, 4:6],
        )
        return matrices, self.elastic * torch.randn(n, 2, ELASTIC_GRID**2, generator=generator)


def affine_matrices(angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Inverse maps for `F.affine_grid`, (N, 2, 3), with the meaning of torchvision's `affine`.

    Args:
        angle: degrees, clockwise, (N,).
        translate: pixels right and down, (N, 2).
        scale: factor, (N,).
        shear: degrees along x and along y, (N, 2).
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


def grid_basis(device: torch.device) -> Tensor:
    """(3 + K * K, 784): x, y and 1 of each pixel, then each elastic control point's bicubic bump, in half images."""
    whole = [1, 1, IMAGE_SIZE, IMAGE_SIZE]
    xy = F.affine_grid(torch.eye(2, 3).unsqueeze(0), whole, align_corners=False).view(-1, 2).t()
    k = ELASTIC_GRID
    bumps = F.interpolate(torch.eye(k * k).view(k * k, 1, k, k), IMAGE_SIZE, mode="bicubic")
    return torch.cat([xy, torch.ones_like(xy[:1]), bumps.view(k * k, -1) * 2 / IMAGE_SIZE]).to(device)


def warp(images: Tensor, matrices: Tensor, displacements: Tensor, basis: Tensor) -> Tensor:
    """Sample float images (N, 1, 28, 28) at the points that `matrices` (N, 2, 3) name, bilinearly, 0 outside.

    `displacements` (N, 2, K * K) moves the points further, in pixels, smoothly between control points.
    This is `F.affine_grid` and `F.grid_sample`; the grid is one product with `grid_basis`, 15 times as fast on a CPU.
    """
    grid = torch.cat([matrices, displacements], 2).flatten(0, 1) @ basis
    grid = grid.view(-1, 2, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Loader:
    """Batches of (normalised images float (B, 1, 28, 28), labels (B,)) from a Split, like a DataLoader's.

    Shuffled and augmented if an Augmentation is given, in order and unchanged otherwise. The images of an epoch
    depend on `seed`, `batch_size` and the number given to `set_epoch`, not on the epochs before.
    """

    def __init__(self, split: Split, batch_size: int, augmentation: Augmentation | None = None, seed: int = 0) -> None:
        self.split, self.batch_size, self.augmentation, self.seed = split, batch_size, augmentation, seed
        self.epoch = 0
        self.basis = grid_basis(split.images.device)
        # Work on many batches at a time: few calls, and what they make still fits a CPU's cache.
        self.chunk = max(1, 1024 // batch_size) * batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next pass, as `DistributedSampler.set_epoch` does."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        (images, labels), n = self.split, len(self.split.labels)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.arange(n) if self.augmentation is None else torch.randperm(n, generator=generator)
        for index in order.to(images.device).split(self.chunk):
            x, y = images[index].float().div_(255), labels[index]
            if self.augmentation is not None:
                matrices, displacements = self.augmentation.sample(len(index), generator)
                x = warp(x, matrices.to(x.device), displacements.to(x.device), self.basis)
            yield from zip(normalize(x).split(self.batch_size), y.split(self.batch_size))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.inference_mode()
def predict(model: torch.nn.Module, split: Split, batch_size: int = 500) -> Tensor:
    """Logits float (N, 10) of the whole split, in eval mode, on its device."""
    was_training = model.training
    model.eval()
    logits = torch.cat([model(x) for x, _ in Loader(split, batch_size)])
    model.train(was_training)
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percentage of rows of `logits` (N, 10) whose largest entry is at `labels` (N,)."""
    return 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def scores(part: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Cross-entropy and accuracy of `logits` (N, 10), called after the `part` of the data: "val_loss" and so on."""
    return {f"{part}_loss": F.cross_entropy(logits, labels).item(), f"{part}_accuracy": accuracy(logits, labels)}


def confusion_matrix(predictions: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 (10, 10): row is the true digit, column the predicted one."""
    return torch.bincount(labels * 10 + predictions, minlength=100).view(10, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Ones with a flag, sevens with a bar, nines with a tail. A point is a complex number: x + iy, in pixels, y down.

ROOM = 10  # pixels around an image, for strokes that leave it until it is centred again


def draw_foreign_shapes(split: Split, share: float, seed: int) -> Split:
    """`split` with a flag on `share` of its ones, a bar on as many of its sevens, a tail on as many of its nines.

    MNIST's writers were Americans, who hardly ever draw these. All other images stay as they are.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, use=SHAPES))
    images, labels = split.images.cpu().clone(), split.labels.cpu()
    for digit in (1, 7, 9):
        candidates = (labels == digit).nonzero().squeeze(1)
        order = torch.randperm(len(candidates), generator=generator)
        chosen = candidates[order[: round(share * len(candidates))]]
        ink = F.pad(images[chosen, 0] / 255, [ROOM] * 4)
        ink = center_by_mass(draw_foreign_shape(ink, digit, generator))
        images[chosen, 0] = (255 * ink).round().byte()
    return Split(images.to(split.images.device), split.labels)


def draw_foreign_shape(ink: Tensor, digit: int, generator: torch.Generator) -> Tensor:
    """`ink` (N, side, side), 0 to 1, of ones, sevens or nines, with what belongs to `digit` drawn on each."""
    side = ink.shape[1]
    inked_rows = (ink > 0.5).any(2).int()
    top = inked_rows.argmax(1)
    height = side - 1 - inked_rows.flip(1).argmax(1) - top
    middles = (ink + 1e-6) @ torch.arange(float(side)) / (ink + 1e-6).sum(2)  # of an empty row: the image's own

    def at(part: Tensor | float) -> Tensor:
        """The middle of the row's ink at `part` of the digit's height: its tip is at 0, its foot at 1."""
        rows = (top + part * height).round().long()
        return torch.complex(middles.gather(1, rows.unsqueeze(1)).squeeze(1), rows.float())

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(ink), generator=generator)

    def way(low: float, high: float, degrees: Tensor) -> Tensor:
        """From `low` to `high` heights of the digit; 0 degrees lead to the right, 90 down."""
        return torch.polar(uniform(low, high) * height, torch.deg2rad(degrees))

    width = uniform(1.2, 3.0)
    if digit == 1:
        tip, foot = at(0.0), at(1.0)
        ink = draw_stroke(ink, tip, tip + way(0.25, 1.0, 180 - uniform(26, 66)), width)
        left, right = foot - uniform(0.1, 0.3) * height, foot + uniform(0.1, 0.3) * height
        some = slice(None, None, 7)  # have a base as well
        ink[some] = draw_stroke(ink[some], left[some], right[some], width[some])
    elif digit == 7:
        stem, tilt = at(uniform(0.42, 0.62)), uniform(-20, 10)
        ink = draw_stroke(ink, stem - way(0.12, 0.35, tilt), stem + way(0.15, 0.4, tilt), width)
    else:
        foot = at(1.0)
        bend = foot + way(0.12, 0.3, uniform(160, 190))
        end = bend + way(0.08, 0.3, uniform(185, 230))
        ink = draw_stroke(draw_stroke(ink, foot, bend, width), bend, end, width)
    return ink


def draw_stroke(ink: Tensor, start: Tensor, end: Tensor, width: Tensor) -> Tensor:
    """`ink` (N, side, side), 0 to 1, with a straight stroke from `start` to `end` (N,), `width` (N,) pixels wide."""
    start, end, width = (value.view(-1, 1, 1) for value in (start, end, width))
    offset = pixel_grid(ink.shape[1]) - start
    along = (offset / (end - start)).real.clamp(0, 1)  # where the stroke is nearest: 0 at its start, 1 at its end
    distance = (offset - along * (end - start)).abs()
    return torch.maximum(ink, (width / 2 + 0.5 - distance).clamp(0, 1))


def center_by_mass(ink: Tensor) -> Tensor:
    """`ink` (N, side, side) as images (N, 28, 28), the centre of mass at pixel (14, 14), as in MNIST.

    Shrunk where ink would come nearer than 2 pixels to the edge; moved by whole pixels otherwise.
    """
    side, pixels = ink.shape[1], pixel_grid(ink.shape[1])
    center = (ink * pixels).sum((1, 2), keepdim=True) / ink.sum((1, 2), keepdim=True)
    center = torch.complex(center.real.round(), center.imag.round())
    distance = torch.view_as_real(pixels - center).abs().amax(3)
    scale = ((distance * (ink > 0)).amax((1, 2), keepdim=True) / 12).clamp(min=1)
    sources = center + scale * (pixel_grid(IMAGE_SIZE) - (14 + 14j))  # the points that the new pixels show
    grid = torch.view_as_real(sources) * 2 / (side - 1) - 1  # grid_sample's units: -1 to 1 from edge to edge
    return F.grid_sample(ink.unsqueeze(1), grid, align_corners=True).squeeze(1)


def pixel_grid(side: int) -> Tensor:
    """Each pixel of an image as a point, (side, side)."""
    x, y = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="xy")
    return torch.complex(x, y)


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser, schedule, weight averaging


def make_optimizer(model: torch.nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum, each step one fused call; the momentum is there, as zeros, before the first step."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay, fused=True
    )
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def one_cycle(step: int, total: int, lr: float, peak_lr: float, warmup: float) -> float:
    """Learning rate of `step` (0 to total - 1) in one cycle (Smith & Topin, 2018).

    It starts at `lr`, rises to `peak_lr` along half a cosine during the first `warmup` (0 to 1) of
    all steps and falls along another towards 0, which step `total` would reach.
    """
    rise = warmup * total
    if step < rise:
        return peak_lr + (lr - peak_lr) * (1 + math.cos(math.pi * step / rise)) / 2
    return peak_lr * (1 + math.cos(math.pi * (step - rise) / (total - rise))) / 2


class WeightAverage:
    """Exponential moving average of a network's weights over about `steps` steps, in `model`, without dropout.

    The first step copies the weights; after n, a new one weighs 1 / (1 + n / 10) until that falls to 1 / `steps`.
    Running statistics are not averaged: `torch.optim.swa_utils.update_bn` measures them.
    """

    def __init__(self, model: Net, steps: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.scale_dropout(0)
        self.steps, self.count = steps, 0

    @torch.no_grad()
    def update(self, model: Net) -> None:
        """Take in the present weights of `model`."""
        weight = max(1 / self.steps, 1 / (1 + self.count / 10))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        self.count += 1


# ---------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all, read with suspicion


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on leaving it becomes `path` at once, after an error it is gone.

    The name is fixed, so what a killed process left there is overwritten by the next.
    """
    temporary = path.parent / f".{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; UserError if the place cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def save_checkpoint(path: Path, model: Net, **contents: Any) -> None:
    """Write architecture and weights of `model` and `contents`, whole or not at all; UserError if that fails."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()  # in memory first: torch.save reports a full disk in its own, longer words
    torch.save({"architecture": model.architecture, "model": weights, "versions": versions(), **contents}, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `train.py`, never running code from it; UserError if it is not a whole and sound one.

    `torch.load` gets only uncompressed zip archives whose checksums are right, which it does not look at itself.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            parts, size = archive.infolist(), file.seek(0, os.SEEK_END)
            compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            if compressed or sum(part.file_size for part in parts) > size:
                raise ValueError("compressed or oversized parts")
            file.seek(0)
            if file.read(4) != b"PK\x03\x04" or archive.testzip():
                raise ValueError("wrong beginning or checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"architecture": dict, "model": dict, "recipe": dict, "metrics": dict, "epoch": int}
        if any(type(checkpoint[part]) is not kind for part, kind in kinds.items()):
            raise ValueError("parts are of another kind")
    except FileNotFoundError as error:
        hint = "make one with `python train.py`, or use the released one, assets/mnist_cnn.pt"
        raise UserError(f"no checkpoint at {path}: {hint}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged or crafted archive makes zipfile and torch raise nearly anything
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({type(error).__name__})") from error
    return checkpoint


def load_model(path: Path, device: torch.device) -> tuple[Net, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on `device`, and the checkpoint.

    Raises UserError as `load_checkpoint`, and where architecture and weights do not fit or are not finite.
    """
    checkpoint = load_checkpoint(path)
    try:
        if not 1 <= checkpoint["architecture"]["width"] <= MAX_WIDTH:
            raise ValueError("width")
        model = Net(**checkpoint["architecture"])
        load_tensors(model.state_dict(), checkpoint["model"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} holds another network than this model.py, or damaged weights ({error})") from error
    return place(model, device).eval(), checkpoint


def load_tensors(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy `values` into `targets`, the tensors of a state_dict(); after an error, some may have been copied.

    Raises ValueError unless names, shapes and types are the same and all numbers finite.
    """
    if values.keys() != targets.keys():
        raise ValueError(f"{', '.join(sorted(values.keys() ^ targets.keys())[:3])} in one of them only")
    for name, target in targets.items():
        value = values[name]
        if value.shape != target.shape or value.dtype != target.dtype or not value.isfinite().all():
            raise ValueError(name)
        with torch.no_grad():
            target.copy_(value)


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
