"""Everything around the network: devices, data and augmentation, optimiser and schedule, checkpoints."""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import math
import os
import platform
import signal
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
from torch import Tensor, nn

from model import CLASSES, IMAGE_SIZE, Net

ROOT = Path(__file__).resolve().parent
MNIST_CRC32 = 4083391318  # of the 60,000 training images; other images get no national variants unless asked for
MAX_IMAGES = 1_000_000  # more than any data set in MNIST's format has


# ---------------------------------------------------------------------------------------------------------------------
# Errors and flags


class UserError(Exception):
    """What the user can mend: its one-line message says what is wrong and what to do."""


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its status; what the machine or the user got wrong is one line on stderr, status 2."""
    torch.set_num_threads(1)  # a second thread brings little, and costs most of the speed once anything else runs
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
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
        help="auto takes cuda where there is one, else cpu; nobody has tried mps (default: %(default)s)",
    )  # fmt: skip


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """--checkpoint and --split, for the two scripts that read one."""
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("checkpoints/model.pt"), metavar="PATH",
        help="weights written by train.py (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=tuple(SPLITS), default="test",
        help="images to read: the test set, those that the checkpoint's training held out (--val-size, --folds), "
        "or those it was trained on (default: %(default)s)",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Device and seeds


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else cpu. UserError for one that is absent."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if present["cuda"] else "cpu"
    if not present[name]:
        raise UserError(f"--device {name}: this machine or this build of PyTorch has none; try --device auto")
    return torch.device(name)


def to_device(model: Net, device: torch.device) -> Net:
    """Move `model` to `device`; a CPU computes its convolutions and pooling fastest in channels-last memory."""
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    return model.to(device, memory_format=layout)


ORDER, DROPOUT, WEIGHTS, VARIANTS = range(4)  # uses of random numbers; augmentation goes with the order


def derive_seed(seed: int, epoch: int = 0, use: int = ORDER) -> int:
    """One 64-bit seed for each seed, epoch and use, so that (seed 1, epoch 2) and (seed 2, epoch 1) share nothing."""
    return int(np.random.SeedSequence((seed, epoch, use)).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Split(NamedTuple):
    """Images uint8 (N, 1, 28, 28), 0 to 255, and labels int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def select(self, index: Tensor | slice) -> Split:
        """The images and labels at `index`, indices or flags as a tensor, or a slice."""
        return Split(self.images[index], self.labels[index])


def load_mnist(data_dir: Path, train: bool, device: torch.device) -> Split:
    """The training or the test split of the data set in `data_dir`, as one tensor on `device`.

    The four IDX files lie as `find_idx` says, packed or not. A folder that is missing or empty is filled by
    torchvision's download. Raises UserError for files that are missing, damaged, or do not fit the network.
    """
    if not data_dir.is_dir() or not any(data_dir.iterdir()):
        download_mnist(data_dir)
    part = "train" if train else "t10k"
    image_file = find_idx(data_dir, f"{part}-images-idx3-ubyte")
    label_file = find_idx(data_dir, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.dim() != 3 or images.shape[1] != images.shape[2]:
        raise UserError(f"{image_file} holds {' x '.join(map(str, images.shape))} values, not N square images")
    if images.shape[1] != IMAGE_SIZE:
        size = images.shape[1]
        raise UserError(f"{image_file} has images of {size} x {size}; for these, set IMAGE_SIZE = {size} in model.py")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{image_file} has {len(images)} images, but {label_file} {len(labels)} labels")
    if labels.max() >= CLASSES:
        most = int(labels.max())
        raise UserError(f"{label_file} has labels up to {most}; for these, set CLASSES = {most + 1} in model.py")
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
    """The IDX file `name` or `name`.gz in `data_dir`, or as torchvision lays it out, in `data_dir`/MNIST/raw.

    If there is no MNIST, another set's folder beside it will do: FashionMNIST/raw. UserError for none or several.
    """
    others = sorted(data_dir.glob("*/raw"))
    for folders in ([data_dir / "MNIST/raw"], [data_dir], [data_dir / "raw"], others):
        found = [[f for f in (folder / name, folder / f"{name}.gz") if f.is_file()] for folder in folders]
        found = [files[0] for files in found if files]
        if len(found) > 1:
            raise UserError(f"--data-dir {data_dir} holds several data sets: name one, such as {found[0].parent}")
        if found:
            return found[0]
    raise UserError(
        f"no {name} or {name}.gz in {data_dir}, {data_dir}/MNIST/raw or another data set's folder there; "
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


def make_splits(everything: Split, val_size: int, folds: int, fold: int) -> tuple[Split, Split | None]:
    """(training images, held-out ones or None) of a recipe with these settings; UserError if too few are left."""
    if max(val_size, 10 * folds) >= len(everything.labels):
        raise UserError(f"--val-size or --folds leave too few of {len(everything.labels):,} images to train on")
    if folds:
        return fold_split(everything, folds, fold)
    return validation_split(everything, val_size) if val_size else (everything, None)


def validation_split(split: Split, size: int) -> tuple[Split, Split]:
    """Stratified (rest, held-out) with `size` images held out, 0 < size < N; always the same."""
    n, by_class = len(split.labels), shuffled_by_class(split.labels)
    return split_at(split, by_class[(torch.arange(size) * n + n // 2) // size])  # evenly spaced through the classes


def fold_split(split: Split, folds: int, fold: int) -> tuple[Split, Split]:
    """Stratified (rest, fold number `fold`) of `folds` (1 to `folds`), which are disjoint and make up the whole."""
    return split_at(split, shuffled_by_class(split.labels)[fold - 1 :: folds])


def split_at(split: Split, index: Tensor) -> tuple[Split, Split]:
    """(the others, those at `index`), both in the order of `split`."""
    chosen = torch.zeros(len(split.labels), dtype=torch.bool)
    chosen[index] = True
    chosen = chosen.to(split.labels.device)
    return split.select(~chosen), split.select(chosen)


SPLITS = {"test": "test", "val": "validation", "train": "training"}  # for --split, and in words


def load_split(name: str, data_dir: Path, checkpoint: dict[str, Any], device: torch.device) -> Split:
    """The "test", "val" or "train" images of a checkpoint's training, as they are on disk.

    Raises UserError where it held out none, or where `data_dir` has other images than it was trained on.
    """
    if name == "test":
        return load_mnist(data_dir, train=False, device=device)
    everything = load_mnist(data_dir, train=True, device=device)
    if crc32(everything) != checkpoint["data_crc"]:
        raise UserError(f"--split {name}: {data_dir} has other images than this checkpoint was trained on")
    rest, held_out = make_splits(everything, *(checkpoint["recipe"][key] for key in ("val_size", "folds", "fold")))
    if name == "val" and held_out is None:
        raise UserError("--split val: this training held out no images; train with --val-size or --folds")
    return rest if name == "train" else held_out


def crc32(split: Split) -> int:
    """The checksum of the images by which a data set is known again."""
    return zlib.crc32(split.images.cpu().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Batches and augmentation


# After a first pass most images are read with a loss near zero, and teach next to nothing: later passes leave out many.
PASSES = 3  # in each epoch but the first; each is over a third of the images
HARD = 0.5  # share of a pass that goes to the images with the largest losses


class Loader:
    """Shuffled and augmented batches of a Split: images float (B, 1, 28, 28), labels (B,), their index (B,) in it.

    Epoch 0 shows each image, or its variant, once. Later ones show as many, in `PASSES` passes over those that `choose`
    takes by `losses` (N,), where the training notes the loss that each image last had (after Jiang et al.,
    "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019). An epoch depends on seed, batch size, its
    number and `losses`.
    A last batch of one image, which has no variance to normalise by, joins the one before.
    """

    def __init__(self, split: Split, batch_size: int, augmentation: Augmentation, seed: int) -> None:
        self.split, self.augmentation, self.seed = split, augmentation, seed
        self.epoch = 0
        self.variants, self.shares = draw_variants(split, augmentation.variants, seed)
        self.losses = torch.zeros(len(split.labels), device=split.labels.device)
        full, rest = divmod(len(split.labels), batch_size)
        self.sizes = [batch_size] * full + [rest] * (rest > 0)
        if rest == 1 and full:
            self.sizes[-2:] = [batch_size + 1]
        # Augment many batches at a time: few calls, and what they make still fits a CPU's cache.
        together = max(1, 1024 // batch_size)
        self.chunks = [self.sizes[i : i + together] for i in range(0, len(self.sizes), together)]

    def __len__(self) -> int:
        return len(self.sizes)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next pass, as `DistributedSampler.set_epoch` does."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        images, labels = self.split
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        length = math.ceil(len(self.chunks) / (PASSES if self.epoch else 1))
        for start in range(0, len(self.chunks), length):
            chunks = self.chunks[start : start + length]
            order = self.choose(sum(map(sum, chunks)), generator)  # by the losses as the pass before left them
            for sizes, index in zip(chunks, order.split([sum(sizes) for sizes in chunks])):
                vary = torch.rand(len(index), generator=generator).to(index.device) < self.shares[index]
                x = torch.where(vary.view(-1, 1, 1, 1), self.variants[index], images[index])
                x = augment(x.float().div_(255), self.augmentation, generator)
                yield from zip(x.split(sizes), labels[index].split(sizes), index.split(sizes))

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """Shuffled indices (count,), none twice: `HARD` of them those with the largest losses, the rest any others."""
        priority = torch.rand(len(self.losses), generator=generator)
        priority[self.losses.topk(int(HARD * count)).indices.cpu()] += 1
        chosen = priority.topk(count).indices
        return chosen[torch.randperm(count, generator=generator)].to(self.losses.device)


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """What happens to training images, at random for each: float (N, 1, 28, 28), ink 1 on paper 0, to the same.

    The place for your own. N is about 1,000, and a transform of torchvision draws once for all images that it is
    given; so draw N numbers for N images, from `generator`: `torch.rand(len(images), generator=generator)`.
    """
    matrices, displacements = augmentation.sample(len(images), generator)
    device = images.device
    return warp(images, matrices.to(device), displacements.to(device), grid_basis(device))


ELASTIC_GRID = 5  # K: control points of the elastic distortion along each side


class Augmentation(NamedTuple):
    """Ranges of the random transform of each image; all zeros leave the images as they are."""

    rotation: float = 0.0  # degrees, either way
    scale: float = 0.0  # 0.1 is 0.9 to 1.1
    translate: float = 0.0  # fraction of the image's side, either way
    shear: float = 0.0  # degrees, either way, along x and along y
    elastic: float = 0.0  # standard deviation, in pixels, of the displacement of each control point
    variants: float = 0.0  # factor of how often a digit is shown as its national variant

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


@functools.lru_cache
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


# ---------------------------------------------------------------------------------------------------------------------
# National variants: a flag on ones, a bar on sevens, a tail on nines, a slash through zeros. MNIST's writers were
# Americans, who hardly ever draw them. A point is a complex number: x + iy, in pixels, y down.

SHARES = {0: 0.12, 1: 0.25, 7: 0.25, 9: 0.25}  # how often a digit is shown as its variant; of zeros, an open one
ROOM = 10  # pixels around an image, for strokes that leave it until it is centred again
OPEN = 7  # pixels of paper that a zero's hole is wide: a slash would blot a narrower one


def draw_variants(split: Split, factor: float, seed: int) -> tuple[Tensor, Tensor]:
    """(variants uint8 (N, 1, 28, 28), shares (N,)): what to show instead of each image of `split`, and how often.

    Shares are `factor` times SHARES, and 0 where there is no variant.
    """
    shares = torch.zeros(len(split.labels), device=split.labels.device)
    if not factor:
        return split.images, shares
    variants = split.images.clone()
    generator = torch.Generator().manual_seed(derive_seed(seed, use=VARIANTS))
    for digit, share in SHARES.items():
        for index in (split.labels == digit).nonzero().squeeze(1).split(128):  # as many as fit a CPU's cache
            ink = F.pad(split.images[index, 0].cpu() / 255, [ROOM] * 4)
            drawn = center_by_mass(draw_variant(ink, digit, generator))
            variants[index, 0] = (255 * drawn).round().byte().to(variants.device)
            shares[index] = factor * share * (is_open(ink) if digit == 0 else torch.ones(len(index))).to(shares.device)
    return variants, shares


def is_open(ink: Tensor) -> Tensor:
    """Which zeros of `ink` (N, side, side) have a hole that is wide enough for a slash, (N,)."""
    row = ink[:, ink.shape[1] // 2] > 0.5
    first, last = row.int().argmax(1), ink.shape[1] - 1 - row.flip(1).int().argmax(1)
    return last + 1 - first - row.sum(1) >= OPEN


def draw_variant(ink: Tensor, digit: int, generator: torch.Generator) -> Tensor:
    """`ink` (N, side, side), 0 to 1, of zeros, ones, sevens or nines, with what belongs to `digit` drawn on each."""
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
    if digit == 0:
        middle, half = at(uniform(0.4, 0.6)), way(0.55, 1.0, uniform(-90, -25))
        ink = draw_stroke(ink, middle - half, middle + half, width)
    elif digit == 1:
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
    line = torch.arange(float(ink.shape[1]))
    x, y = (line - start.real.view(-1, 1, 1)), (line.view(-1, 1) - start.imag.view(-1, 1, 1))
    way = (end - start).view(-1, 1, 1)
    length = way.abs().clamp(min=1e-6)
    dx, dy = way.real / length, way.imag / length
    along = (x * dx + y * dy).clamp(min=0).minimum(length)  # where the stroke is nearest to a pixel, from its start
    distance = ((x - along * dx).square() + (y - along * dy).square()).sqrt()
    return torch.maximum(ink, (width.view(-1, 1, 1) / 2 + 0.5 - distance).clamp(0, 1))


def center_by_mass(ink: Tensor) -> Tensor:
    """`ink` (N, side, side) as images (N, 28, 28), the centre of mass at pixel (14, 14), as in MNIST.

    Shrunk where ink would come nearer than 2 pixels to the edge; moved by whole pixels otherwise.
    """
    line = torch.arange(float(ink.shape[1]))
    profiles = torch.stack([ink.sum(1), ink.sum(2)], 1)  # (N, 2, side): along x and along y
    center = (profiles @ line / profiles.sum(2)).round().unsqueeze(2)
    reach = ((line - center).abs() * (profiles > 0)).amax((1, 2)).view(-1, 1, 1)
    sources = center + (reach / 12).clamp(min=1) * (torch.arange(IMAGE_SIZE) - 14)  # the points that new pixels show
    x, y = (sources * 2 / (len(line) - 1) - 1).unbind(1)  # grid_sample's units: -1 to 1 from edge to edge
    shape = len(ink), IMAGE_SIZE, IMAGE_SIZE
    grid = torch.stack([x.unsqueeze(1).expand(shape), y.unsqueeze(2).expand(shape)], 3)
    return F.grid_sample(ink.unsqueeze(1), grid, align_corners=True).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser and schedule


def make_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, each step one fused call. Any other that steps without a closure may stand here."""
    return torch.optim.SGD(
        model.parameters(), lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay, fused=True
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, lr: float, peak_lr: float, warmup: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """One cycle (Smith & Topin, 2018), stepped after each step. Any other that needs no metric may stand here.

    The rate starts at `lr`, rises to `peak_lr` along half a cosine during the first `warmup` (0 to 1) of all `steps`
    and falls along another towards 0, which it reaches behind the last one.
    """
    # OneCycleLR counts from 0 to total_steps - 1, and the peak is at pct_start * total_steps - 1.
    pct_start = (warmup * steps + 1) / (steps + 1) if warmup else 0.0
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=steps + 1, pct_start=pct_start, div_factor=peak_lr / lr,
        final_div_factor=math.inf, cycle_momentum=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and counts


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits float (N, 10), on the device of both, for uint8 images (N, 1, 28, 28); leaves `model` in eval mode."""
    model.eval()
    return torch.cat([model(batch / 255) for batch in images.split(500)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percentage of rows of `logits` (N, 10) whose largest entry is at `labels` (N,)."""
    return 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def scores(part: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Cross-entropy and accuracy of `logits` (N, 10), called after the `part` of the data: "val_loss" and so on."""
    return {f"{part}_loss": F.cross_entropy(logits, labels).item(), f"{part}_accuracy": accuracy(logits, labels)}


def confusion_matrix(predictions: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 (10, 10): row is the true digit, column the predicted one."""
    return torch.bincount(labels * CLASSES + predictions, minlength=CLASSES**2).view(CLASSES, CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and other files: written whole or not at all, read with suspicion


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
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
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def save_checkpoint(path: Path, model: Net, **contents: Any) -> None:
    """Write architecture and weights of `model` and `contents`, whole or not at all; UserError if that fails."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()  # in memory first: torch.save reports a full disk in its own, longer words
    torch.save({"architecture": model.architecture, "model": weights, "versions": versions(), **contents}, buffer)
    with atomic_write(path) as temporary:
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
        check_parts(checkpoint)
    except FileNotFoundError as error:
        hint = "make one with `python train.py`, or use the released one, assets/mnist_cnn.pt"
        raise UserError(f"no checkpoint at {path}: {hint}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged or crafted archive makes zipfile and torch raise nearly anything
        raise UserError(f"{path} is damaged or not a checkpoint of this train.py ({error!r:.150})") from error
    return checkpoint


def check_parts(checkpoint: dict[str, Any]) -> None:
    """Raise ValueError, or whatever a spoilt value raises, unless all parts of a checkpoint are there and sound."""
    kinds = {"architecture": dict, "model": dict, "recipe": dict, "history": list, "metrics": dict, "data_crc": int}
    for part, kind in kinds.items():
        if type(checkpoint.get(part)) is not kind:
            raise ValueError(f"its part {part!r} is missing or of another kind")
    if any(type(checkpoint["recipe"][name]) is not int for name in ("val_size", "folds", "fold")):
        raise ValueError("recipe")
    needed = {"epoch", "learning_rate", "dropout_factor", "train_loss", "train_accuracy", *checkpoint["history"][-1]}
    if not all(math.isfinite(entry[name]) for entry in checkpoint["history"] for name in needed):
        raise ValueError("history")


def load_model(path: Path, device: torch.device) -> tuple[Net, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on `device`, and the checkpoint.

    Raises UserError as `load_checkpoint`, and where architecture and weights do not fit or are not finite.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = Net(**checkpoint["architecture"])
        require_like(checkpoint["model"], model.state_dict())
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} holds another network than this model.py, or damaged weights ({error})") from error
    return to_device(model, device).eval(), checkpoint


def require_like(value: Any, expected: Any, name: str = "") -> None:
    """Raise ValueError, with the name of the part, unless `value` is built as `expected` is and its numbers are finite.

    That is: dicts of the same keys, sequences of the same length, tensors of the same shape and type.
    """
    if isinstance(expected, (list, tuple)) and type(value) is type(expected):
        value, expected = dict(enumerate(value)), dict(enumerate(expected))
    if isinstance(expected, dict) and isinstance(value, dict):
        if value.keys() != expected.keys():
            names = sorted(map(str, value.keys() ^ expected.keys()))
            raise ValueError(f"{', '.join(names[:3])} in one of them only")
        for key in expected:
            require_like(value[key], expected[key], f"{name}.{key}".lstrip("."))
        return
    fits = type(value) is type(expected)
    if isinstance(expected, Tensor):
        fits = isinstance(value, Tensor) and value.shape == expected.shape and value.dtype == expected.dtype
        fits = fits and bool(value.isfinite().all())
    elif isinstance(expected, (int, float)):
        fits = isinstance(value, (int, float)) and math.isfinite(value)
    if not fits:
        raise ValueError(name)
