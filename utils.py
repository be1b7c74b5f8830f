"""What the three scripts share: data and augmentation, optimiser and schedule, checkpoints, devices and errors."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import platform
import socket
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from model import Net

STD = 0.3081  # of the 60,000 training images, scaled to 0..1
IMAGE_SIZE = 28
# The four raw files with their MD5 sums, and how many dimensions their IDX headers declare.
MNIST_FILES = {
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", 3),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", 1),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", 3),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", 1),
}
DOWNLOAD_TIMEOUT = 10  # seconds for a mirror to answer
MAX_WIDTH = 32  # whose last.pt, 216 MiB, is well below MAX_CHECKPOINT_BYTES
MAX_IMAGES = 1_000_000
MAX_CHECKPOINT_BYTES = 512 * 2**20
# What every checkpoint holds.
CONTENTS = {
    "architecture": dict, "model": dict, "recipe": dict, "seed": int, "epoch": int, "metrics": dict, "versions": dict,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Errors, devices, randomness


class UserError(Exception):
    """Something that the person at the keyboard can mend; its one-line message says what and how."""


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its status; what the machine or the user got wrong is one line on stderr, status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        status = _fail(str(error))
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `python test_model.py | head`
        status = 1
        _discard_output()
    except OSError as error:  # a log, say, on a full disk
        status = _fail(f"{error.filename or 'output'}: {error.strerror or error}")
        _discard_output()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        status = _fail("out of memory; try a smaller --batch-size or --width, or --device cpu")
    sys.exit(status)


OUT_OF_MEMORY = "out of memory", "can't allocate memory"  # PyTorch's words, on a GPU and on a CPU


def _discard_output() -> None:
    """Send to nowhere what is still buffered for a standard output that takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return 2


def warn(message: str) -> None:
    """One line on stderr; the work goes on."""
    print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr)


def in_range(kind: type, low: float, high: float = sys.float_info.max) -> Callable[[str], Any]:
    """An argparse type: `kind(text)` within [low, high], refused in argparse's own words otherwise."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == sys.float_info.max else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """--data-dir and --device, the same in all three scripts."""
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("MNIST_DATA_DIR") or "data"), metavar="DIR",
        help="folder with MNIST/raw/, downloaded there on first use (default: $MNIST_DATA_DIR, else data)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto takes cuda, then mps, then cpu (default: auto)",
    )  # fmt: skip


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, for the two scripts that read one."""
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("checkpoints/model.pt"), metavar="PATH",
        help="weights written by train.py (default: %(default)s)",
    )  # fmt: skip


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


def derive_seed(*numbers: int) -> int:
    """One 64-bit seed from several numbers, so that (seed 1, epoch 2) and (seed 2, epoch 1) share nothing.

    A zero at the end changes nothing: (seed,) and (seed, 0) are the same.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


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
    """The training or the test split, as one tensor on `device`; the files are checked, and downloaded if missing.

    Raises UserError for files that are missing and cannot be had, or that are not MNIST-format IDX files.
    """
    prepare_mnist(data_dir)
    part = data_dir / "MNIST" / "raw" / ("train" if train else "t10k")
    labels = np.fromfile(f"{part}-labels-idx1-ubyte", np.uint8, offset=8)  # after magic number and sizes
    images = np.fromfile(f"{part}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return Split(torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device))


def prepare_mnist(data_dir: Path) -> dict[str, str]:
    """See to it that the four raw files are in `data_dir`/MNIST/raw and well-formed; UserError if not.

    Returns their MD5 sums by name. A process looks at a folder once.
    """
    raw = data_dir / "MNIST" / "raw"
    if raw in _prepared:
        return _prepared[raw]
    try:
        for name in MNIST_FILES:
            if not (raw / name).exists() and (raw / f"{name}.gz").exists():
                _unpack(raw / f"{name}.gz", raw / name)
        missing = [name for name in MNIST_FILES if not (raw / name).exists()]
        if missing:
            _download(data_dir, raw, missing)
        counts = {name: _check_idx(raw / name) for name in MNIST_FILES}
        sums = {name: md5_sum(raw / name) for name in MNIST_FILES}
    except OSError as error:
        raise UserError(f"cannot read MNIST in {raw}: {error.strerror or error}") from error
    for part in ("train", "t10k"):
        images, labels = counts[f"{part}-images-idx3-ubyte"], counts[f"{part}-labels-idx1-ubyte"]
        if images != labels:
            raise UserError(f"{raw}: {images} {part} images but {labels} labels; delete the {part} files, run again")
    altered = [name for name, (md5, _) in MNIST_FILES.items() if sums[name] != md5]
    if altered:
        warn(f"not the official MNIST (checksum differs), used as it is: {raw}/{{{','.join(altered)}}}")
    _prepared[raw] = sums
    return sums


_prepared: dict[Path, dict[str, str]] = {}  # what prepare_mnist has returned in this process


def md5_sum(path: Path) -> str:
    """MD5 sum of the file at `path`, in hexadecimal: tells versions of a file apart, keeps nobody out."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _parse_idx_header(header: bytes, dims: int, path: Path) -> list[int]:
    """Sizes declared by an IDX header of `dims` dimensions of unsigned bytes; UserError if it is anything else.

    Source: the file format section of LeCun's MNIST page.
    """
    mend = "delete it and run again to download it"
    if len(header) < 4 + 4 * dims:
        raise UserError(f"{path} is truncated: only {len(header)} bytes; {mend}")
    magic, *sizes = struct.unpack(f">{1 + dims}I", header[: 4 + 4 * dims])
    if magic != 0x0800 + dims:
        raise UserError(f"{path} is not an MNIST file: magic number {magic}, expected {0x0800 + dims}; {mend}")
    if not 0 < sizes[0] <= MAX_IMAGES or any(size != IMAGE_SIZE for size in sizes[1:]):
        raise UserError(
            f"{path} declares {' x '.join(map(str, sizes))}, expected N{' x 28 x 28' * (dims == 3)}; {mend}"
        )
    return sizes


def _check_idx(path: Path) -> int:
    """Number of items in the IDX file at `path`; UserError if header, size or labels are not MNIST's format."""
    dims = MNIST_FILES[path.name][1]
    with path.open("rb") as file:
        sizes = _parse_idx_header(file.read(4 + 4 * dims), dims, path)
        expected, actual = 4 + 4 * dims + math.prod(sizes), path.stat().st_size
        if actual != expected:
            state = "truncated" if actual < expected else "too long"
            raise UserError(
                f"{path} is {state}: {actual:,} bytes, its header declares {expected:,}; "
                "delete it and run again to download it"
            )
        if dims == 1:
            largest = max(file.read())
            if largest > 9:
                raise UserError(
                    f"{path} has a label {largest}, digits are 0 to 9; delete it and run again to download it"
                )
    return sizes[0]


def _unpack(packed: Path, path: Path) -> None:
    """Decompress a gzipped IDX file, no further than its own header says; UserError if it is not one."""
    dims = MNIST_FILES[path.name][1]

    def read(size: int) -> bytes:
        try:
            return file.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{packed} is not a readable gzip file ({error}); delete it and run again") from error

    with gzip.open(packed) as file:
        header = read(4 + 4 * dims)
        size = math.prod(_parse_idx_header(header, dims, packed))
        with replacing(path) as temporary, temporary.open("wb") as target:
            target.write(header)
            while size > 0 and (part := read(min(size, 2**20))):
                target.write(part)
                size -= len(part)
            if size or read(1):
                raise UserError(f"{packed} does not hold what its header declares; delete it and run again")


def _download(data_dir: Path, raw: Path, missing: list[str]) -> None:
    """Torchvision's own download of the `missing` files, which gives up on a silent mirror after seconds.

    It goes to a folder of its own first, so that files which are there stay as they are, and no half of a
    file is ever in `raw`. UserError if it fails.
    """
    print(f"Downloading MNIST to {raw}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    created = not data_dir.exists()
    try:
        from torchvision.datasets import MNIST  # here, because this import takes as long as PyTorch's own

        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
            MNIST(folder, download=True)
            raw.mkdir(parents=True, exist_ok=True)
            for name in missing:
                os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)
    except (ImportError, OSError, RuntimeError, HTTPException) as error:
        if created and data_dir.is_dir() and not any(data_dir.iterdir()):
            data_dir.rmdir()
        raise UserError(
            f"no MNIST in {raw}: missing {', '.join(missing)} (or the same with .gz), and the download failed "
            f"({str(error).splitlines()[-1] if str(error) else type(error).__name__}); put the four files there, "
            "or point elsewhere with --data-dir DIR or MNIST_DATA_DIR=DIR, where DIR holds MNIST/raw/"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _shuffled_by_class(labels: Tensor, seed: int) -> Tensor:
    """0..N-1, class after class of `labels` (N,), in random order within each."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(seed)))
    return shuffled[torch.argsort(labels.cpu()[shuffled], stable=True)]


def stratified_folds(labels: Tensor, folds: int, seed: int) -> list[Tensor]:
    """Split 0..N-1 into `folds` sorted index tensors, disjoint, each with its share of every class in `labels` (N,)."""
    by_class = _shuffled_by_class(labels, seed)
    return [by_class[fold::folds].sort().values.to(labels.device) for fold in range(folds)]


def hold_out(split: Split, size: int, seed: int) -> tuple[Split, Split]:
    """Stratified (rest, held-out) with `size` images held out, 0 < size < N; the same for the same seed."""
    n, by_class = len(split.labels), _shuffled_by_class(split.labels, seed)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[by_class[(torch.arange(size) * n + n // 2) // size]] = True  # evenly spaced through the classes
    chosen = chosen.to(split.labels.device)
    return split.select(~chosen), split.select(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and augmentation


def normalize(images: Tensor) -> Tensor:
    """(..., 28, 28) with ink 1 on 0 -> the network's input, of standard deviation 1 over MNIST.

    The usual mean of 0.1307 is not subtracted: paper stays 0, as the convolutions' zero padding has it.
    """
    return images / STD


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
        k = ELASTIC_GRID**2 if self.elastic else 0
        return matrices, self.elastic * torch.randn(n, 2, k, generator=generator)


ELASTIC_GRID = 5  # control points along each side


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


def _grid_basis(device: torch.device) -> Tensor:
    """(3 + K * K, 784): x, y and 1 of each pixel, then each elastic control point's bicubic bump, in half images."""
    xy = (
        F.affine_grid(torch.eye(2, 3).unsqueeze(0), [1, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False).view(-1, 2).t()
    )
    k = ELASTIC_GRID
    bumps = F.interpolate(torch.eye(k * k).view(k * k, 1, k, k), IMAGE_SIZE, mode="bicubic")
    return torch.cat([xy, torch.ones_like(xy[:1]), bumps.view(k * k, -1) * 2 / IMAGE_SIZE]).to(device)


def warp(images: Tensor, matrices: Tensor, displacements: Tensor | None = None, basis: Tensor | None = None) -> Tensor:
    """Sample float images (N, 1, 28, 28) at the points that `matrices` (N, 2, 3) name, bilinearly, 0 outside.

    `displacements` (N, 2, K * K) moves the points further, in pixels, smoothly between control points.
    This is `F.affine_grid` and `F.grid_sample`; the grid is one matrix product, 15 times as fast on a CPU.
    """
    basis = _grid_basis(images.device) if basis is None else basis
    coefficients = matrices if displacements is None else torch.cat([matrices, displacements], 2)
    grid = coefficients.flatten(0, 1) @ basis[: coefficients.shape[2]]
    grid = grid.view(-1, 2, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Loader:
    """Batches of (normalised images float (B, 1, 28, 28), labels (B,)) from a Split, like a DataLoader's.

    Shuffled and augmented if an Augmentation is given, in order and unchanged otherwise. On one kind of
    device, the images of an epoch depend on `seed`, `batch_size` and the number given to `set_epoch`, not on
    the epochs before.
    """

    def __init__(self, split: Split, batch_size: int, augmentation: Augmentation | None = None, seed: int = 0) -> None:
        self.split, self.batch_size, self.augmentation, self.seed = split, batch_size, augmentation, seed
        self.epoch = 0
        self.basis = _grid_basis(split.images.device)
        # Work on many batches at a time: few calls, and what they make still fits a CPU's cache, or a GPU's memory.
        images = 1024 if split.images.device.type == "cpu" else 16384
        self.chunk = max(1, images // batch_size) * batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next pass, as `DistributedSampler.set_epoch` does."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        (images, labels), n = self.split, len(self.split.labels)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.arange(n) if self.augmentation is None else torch.randperm(n, generator=generator)
        for index in order.split(self.chunk):
            x = images[index.to(images.device)].float().div_(255)
            y = labels[index.to(images.device)]
            if self.augmentation is not None:
                matrices, displacements = self.augmentation.sample(len(index), generator)
                x = warp(x, matrices.to(x.device), displacements.to(x.device), self.basis)
            yield from zip(normalize(x).split(self.batch_size), y.split(self.batch_size))


@torch.inference_mode()
def predict(model: torch.nn.Module, split: Split, batch_size: int = 500) -> Tensor:
    """Logits float (N, 10) of the whole split, in eval mode, on its device."""
    was_training = model.training
    model.eval()
    logits = torch.cat([model(x) for x, _ in Loader(split, batch_size)])
    model.train(was_training)
    return logits


def classify(model: torch.nn.Module, digits: Tensor) -> Tensor:
    """Probabilities float (N, 10), on the CPU, of prepared digits uint8 (N, 28, 28)."""
    device = next(model.parameters()).device
    no_labels = torch.zeros(len(digits), dtype=torch.long, device=device)
    return predict(model, Split(digits.unsqueeze(1).to(device), no_labels)).softmax(1).cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percentage of rows of `logits` (N, 10) whose largest entry is at `labels` (N,)."""
    return 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def confusion_matrix(predictions: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 (10, 10): row is the true digit, column the predicted one."""
    return torch.bincount(labels * 10 + predictions, minlength=100).view(10, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Your own digits: photos and scans prepared as MNIST's images were (LeCun et al., 1998)

DIGIT_SIZE = 20  # MNIST's digits fit into 20 x 20 of the 28 x 28 pixels
STROKE_WIDTHS = 2.0, 3.6  # pixels; 90 % of MNIST's mean stroke widths lie from 1.6 to 3.6
WORK_SIDE = 512  # larger photos are averaged down to this before the ink is looked for
MIN_SIDE, MAX_PIXELS = 8, 64 * 2**20
MIN_CONTRAST = 6  # of 255 grey levels: fainter marks are taken for paper


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files of `paths` as given, whether they exist or not; folders by what they hold, at any depth, sorted.

    In a folder, extensions that Pillow reads count, hidden files do not. A folder without any stands for itself.
    """
    Image.init()
    readable = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):  # which, unlike Path's, no name can break
            found.append(path)
            continue
        everything = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = sorted(
            file for file in everything
            if file.suffix.lower() in readable and not any(p.startswith(".") for p in file.relative_to(path).parts)
        )  # fmt: skip
        found += files or [path]
    return found


def read_digit(path: Path) -> tuple[Image.Image, Tensor]:
    """The image at `path`, RGB and at most 1024 pixels a side, and its digit prepared, uint8 (28, 28), ink 255 on 0.

    Raises UserError, one line naming the file, for what cannot be read, is blank, too small or too large.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: no images in this folder")
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large and odd files; what matters is refused below
            image = _open_image(path)
        gray = np.asarray(image.convert("L"), np.float32)
        digit = torch.from_numpy(prepare_digit(gray))
        image.thumbnail((1024, 1024))
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image that Pillow can read") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: {reason}") from error
    return image, digit


def _open_image(path: Path) -> Image.Image:
    """The first frame, upright and RGB, averaged down to about twice WORK_SIDE; ValueError for an unfit size."""
    with Image.open(path) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"{width} x {height} pixels are too few, {MIN_SIDE} a side are needed")
        if not image.info.get("progressive"):  # which libjpeg unpacks whole in any case
            image.draft(None, (2 * WORK_SIDE, 2 * WORK_SIDE))
        if image.width * image.height > MAX_PIXELS or (image.info.get("progressive") and width * height > MAX_PIXELS):
            raise ValueError(f"{width} x {height} pixels are too many")
        image.load()
        orientation = image.getexif().get(0x0112)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _stretch(image)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
        elif image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        image = image.reduce(max(1, max(image.size) // (2 * WORK_SIDE)))
    if image.mode == "RGBA":
        image = _on_backdrop(image)
    if orientation in range(2, 9):
        image.getexif()[0x0112] = orientation
        image = ImageOps.exif_transpose(image)
    return image.convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    """16- or 32-bit grey to 8 bits, from its own darkest to its own lightest."""
    values = np.asarray(image, np.float32)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("has values that are not finite")
    return Image.fromarray(((values - low) * (255 / max(high - low, 1))).astype(np.uint8))


def _on_backdrop(image: Image.Image) -> Image.Image:
    """RGBA laid on white, or on black where its visible part is itself light."""
    gray, alpha = np.asarray(image.convert("L"), np.float32), np.asarray(image.getchannel("A"), np.float32)
    light = (gray * alpha).sum() > 127 * alpha.sum()
    backdrop = Image.new("RGBA", image.size, "black" if light else "white")
    return Image.alpha_composite(backdrop, image)


def prepare_digit(gray: np.ndarray) -> np.ndarray:
    """Luminance (H, W), 0 to 255, any polarity -> uint8 (28, 28) as in MNIST, ink 255 on 0; ValueError if blank.

    The longer side of the ink fits into 20 pixels, its centre of mass is at the centre (LeCun et al., 1998).
    Strokes are first brought to a pen that MNIST has seen, so that a hairline survives the reduction.
    """
    gray = _shrink(_undo_enlargement(np.asarray(gray, np.float32)), WORK_SIDE)
    if np.ptp(gray) < MIN_CONTRAST:
        raise ValueError("blank, no ink found")
    ink = np.pad(_find_ink(gray), 2)
    factor = -(-4 * DIGIT_SIZE // max(ink.shape))
    if factor > 1:  # thresholding a smooth enlargement gives smooth outlines
        ink = _resize(ink, ink.shape[0] * factor, ink.shape[1] * factor, Image.BICUBIC)
    ink = np.pad(np.clip(2 * ink - 0.4, 0, 1), max(ink.shape) // 10)
    return _center(_crop(_set_stroke_width(ink)))


def _resize(image: np.ndarray, height: int, width: int, method: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((width, height), method))


def _shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Means of square blocks, so that the longer side is at most `side`."""
    factor = -(-max(image.shape) // side)
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).reduce(factor)) if factor > 1 else image


def _undo_enlargement(gray: np.ndarray) -> np.ndarray:
    """One pixel for each k x k block of equal ones, as nearest-neighbour enlargement leaves them."""
    steps = [np.flatnonzero((np.diff(gray, axis=axis) != 0).any(1 - axis)) + 1 for axis in (0, 1)]
    k = int(np.gcd.reduce(np.concatenate([*steps, gray.shape])))
    return gray[::k, ::k] if min(gray.shape) >= MIN_SIDE * k else gray


def _dilate(image: np.ndarray, window: int) -> np.ndarray:
    """Maximum over a square window of odd side, in log(window) passes."""
    for _ in (0, 1):
        n, reach = len(image), 1
        image = np.pad(image, ((window // 2, window // 2), (0, 0)), mode="edge")
        while 2 * reach <= window:
            image = np.maximum(image[:-reach], image[reach:])
            reach *= 2
        image = np.maximum(image[:n], image[window - reach :][:n]).T
    return image


def _depth(gray: np.ndarray, part: float) -> np.ndarray:
    """How much darker each pixel is than the paper: closing with `part` of the shorter side, minus the image."""
    window = int(min(gray.shape) * part) // 2 * 2 + 1
    return -_dilate(-_dilate(gray, window), window) - gray


def _blur(image: np.ndarray, kernel: Sequence[float]) -> np.ndarray:
    """Separable convolution with an odd `kernel`, mirrored at the edges."""
    r = len(kernel) // 2
    for _ in (0, 1):
        padded, n = np.pad(image, ((r, r), (0, 0)), mode="symmetric"), len(image)
        image = sum(weight * padded[i : i + n] for i, weight in enumerate(kernel)).T
    return image


def _polarity(gray: np.ndarray) -> tuple[float, float]:
    """Two witnesses whose sum is above 0 for dark ink on light paper, below 0 for light on dark.

    Ink is the rarer side of the histogram, whose skewness says which and how rare; in a tight crop,
    where ink may be as frequent, corners and border are mostly paper.
    """
    gray = _shrink(gray, 128)
    window = max(1, min(gray.shape) // 2 * 2 - 1)
    flat = gray - _blur(gray, [1 / window] * window)
    skew = np.mean(((flat - flat.mean()) / max(flat.std(), 1e-6)) ** 3)
    dark, light = _depth(gray, 0.5), _depth(-gray, 0.5)
    level = 0.6 * max(dark.max(), light.max())
    vote = (light > level).astype(float) - (dark > level)
    border = np.concatenate([vote[0], vote[-1], vote[1:-1, 0], vote[1:-1, -1]])
    corners = vote[[0, 0, -1, -1], [0, -1, 0, -1]]
    return -float(skew), float(np.clip(2 * border.mean() + corners.mean(), -0.8, 0.8))


def _trim(gray: np.ndarray) -> np.ndarray:
    """Without the uniform frame that a scanner's lid or a table leaves, up to an eighth of each side."""
    low, middle, high = np.quantile(gray, [0.02, 0.5, 0.98])
    cuts = []
    for side in (gray, gray[::-1], gray.T, gray.T[::-1]):
        quantiles = np.quantile(side[: len(side) // 8], [0.1, 0.5, 0.9], axis=1)
        odd = (abs(quantiles[1] - middle) > (high - low) / 3) & (quantiles[2] - quantiles[0] < (high - low) / 4)
        cuts.append(0 if odd.all() else int((~odd).argmax()))
    if sum(cut > 0 for cut in cuts) < 2:  # one side alone may be the bar of a 7
        return gray
    top, bottom, left, right = (cut + 2 * (cut > 0) for cut in cuts)
    return gray[top : len(gray) - bottom, left : gray.shape[1] - right]


def _flatten(gray: np.ndarray) -> np.ndarray:
    """Minus a quadratic surface fitted to the light paper: what lies well under it is left out of the next fit."""

    def basis(height: int, width: int) -> np.ndarray:
        y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
        return np.stack([np.ones_like(y), y, x, y * x, y * y, x * x], -1).astype(np.float32)

    small = _shrink(gray, 64)
    terms, values = basis(*small.shape).reshape(-1, 6), small.ravel()
    paper = values >= np.quantile(values, 0.3)
    for _ in range(8):
        surface = np.linalg.lstsq(terms[paper], values[paper], rcond=None)[0]
        rest = values - terms @ surface
        tolerance = 2.5 * np.median(abs(rest[paper])) + 2
        paper = (rest > -tolerance) & (rest < 2 * tolerance)
    return gray - basis(*gray.shape) @ surface


def _find_ink(gray: np.ndarray) -> np.ndarray:
    """The digit in (H, W), cropped, ink about 1 on 0; ValueError if there is none."""
    large = min(gray.shape) >= 64
    if large:
        gray = _blur(_trim(gray), [0.25, 0.5, 0.25])
    rare, outside = _polarity(gray)
    sign = 1 if rare + outside >= 0 else -1
    gray = sign * gray
    # Light is uneven in photos, whose strokes are thin; in a tight crop the paper between thick ones is too little.
    rare = sign * rare if large else 0.0
    part = 0.95 if rare < 0.45 else 0.5 if rare < 1.2 else 0.3
    depth = _depth(gray if rare < 0.45 else _flatten(gray), part)
    paper, low = np.quantile(depth, [0.25, 0.05])
    depth = np.maximum(depth - paper, 0)
    noise = max(MIN_CONTRAST, min(5 * (paper - low), 0.4 * depth.max()))
    if depth.max() <= noise:
        raise ValueError("blank, no ink found")
    mask = depth > max(noise, 0.4 * np.quantile(depth[depth > noise], 0.9))
    kept = _select_digit(mask, depth)
    mask &= kept
    ink = np.clip(np.where(kept, depth, 0) / np.quantile(depth[mask], 0.75), 0, 1)
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    return ink[max(top - 2, 0) : bottom + 3, max(left - 2, 0) : right + 3]


def _blocks(image: np.ndarray, factor: int) -> np.ndarray:
    """Sums over blocks of factor x factor, the last ones padded with 0."""
    padded = np.pad(image, [(0, -side % factor) for side in image.shape])
    return padded.reshape(padded.shape[0] // factor, factor, -1, factor).sum((1, 3))


def _components(mask: np.ndarray) -> np.ndarray:
    """8-connected components of `mask` (H, W), numbered from 1 in no order, 0 outside."""
    labels = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while not (labels == (best := _dilate(labels, 3) * mask)).all():
        root = np.arange(mask.size + 1)
        np.maximum.at(root, labels.ravel(), best.ravel())
        while (root[root] != root).any():
            root = root[root]
        labels = root[labels]
    return np.unique(np.append(labels.ravel(), 0), return_inverse=True)[1].ravel()[:-1].reshape(mask.shape)


def _select_digit(mask: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """The heaviest component of `mask` (H, W) with what belongs to it, and its soft rim; specks and frames are not.

    A part belongs if it weighs 4 % of the heaviest and is near: broken strokes, the bar of a 5.
    """
    factor = -(-max(mask.shape) // 128)
    labels, weight = _components(_blocks(mask, factor) > 0), _blocks(depth * mask, factor)
    mass = np.bincount(labels.ravel(), weight.ravel())
    y, x = np.indices(labels.shape)
    (height, width), kept, box = labels.shape, [], None
    to_edge = np.minimum(np.minimum(y, height - 1 - y) / height, np.minimum(x, width - 1 - x) / width)
    for name in [i for i in np.argsort(-mass)[:50] if i and mass[i] > 0]:
        at = labels == name
        if min(height, width) >= 32 and to_edge[at].min() == 0 and np.median(to_edge[at]) < 0.06:
            continue  # a frame or a shadow
        top, bottom, left, right = y[at].min(), y[at].max(), x[at].min(), x[at].max()
        if kept:
            gap = max(top - box[1], box[0] - bottom, left - box[3], box[2] - right)
            if mass[name] < 0.04 * mass[kept[0]] or gap > 0.25 * max(box[1] - box[0] + 1, box[3] - box[2] + 1):
                continue
            top, bottom, left, right = min(top, box[0]), max(bottom, box[1]), min(left, box[2]), max(right, box[3])
        kept.append(name)
        box = top, bottom, left, right
    if not kept:
        raise ValueError("blank, no ink found but at the edge")
    own = np.isin(labels, kept)
    own = _dilate(own, 3) & (own | (labels == 0))
    return own.repeat(factor, 0).repeat(factor, 1)[: mask.shape[0], : mask.shape[1]]


def _crop(ink: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero((ink > 0.5).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _set_stroke_width(ink: np.ndarray) -> np.ndarray:
    """Strokes thickened or thinned until, at 20 pixels, they are as wide as MNIST's; width is 2 area / perimeter."""
    perimeter = np.hypot(np.diff(ink, axis=0)[:, :-1], np.diff(ink, axis=1)[:-1]).sum()
    width, pixel = 2 * ink.sum() / perimeter, max(_crop(ink).shape) / DIGIT_SIZE
    missing = np.clip(width, *(pixel * np.array(STROKE_WIDTHS))) - width
    window = int(abs(missing) / 2 + 0.5) * 2 + 1
    changed = _dilate(ink, window) if missing > 0 else -_dilate(-ink, window)
    return changed if changed.max() > 0.5 else ink


def _center(ink: np.ndarray) -> np.ndarray:
    """Ink (h, w), 0 to 1 and cropped, fitted into 20 pixels, its centre of mass at the centre of uint8 (28, 28)."""
    height, width = (max(1, round(side * DIGIT_SIZE / max(ink.shape))) for side in ink.shape)
    ink = _resize(ink, height, width, Image.BOX)
    ink = ink / ink.max()
    middle = [(np.arange(side) + 0.5) @ ink.sum(1 - axis) / ink.sum() for axis, side in enumerate(ink.shape)]
    top, left = (min(max(round(IMAGE_SIZE / 2 - m), 0), IMAGE_SIZE - side) for m, side in zip(middle, ink.shape))
    digit = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    digit[top : top + height, left : left + width] = np.round(255 * ink)
    return digit


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser, schedule, weight averaging


def make_optimizer(model: torch.nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum in one fused kernel; on a GPU the rate is a tensor, which a CUDA graph can follow."""
    device = next(model.parameters()).device
    rate = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    return torch.optim.SGD(
        model.parameters(), rate, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip


def one_cycle(step: int, total: int, lr: float, peak_lr: float, warmup: float) -> float:
    """Learning rate of `step` (0 to total - 1) in one cycle (Smith & Topin, 2018).

    It starts at `lr`, rises to `peak_lr` along half a cosine during the first `warmup` (0 to 1) of
    all steps and falls along another towards 0, which step `total` would reach.
    """
    rise = warmup * total
    if step < rise:
        return peak_lr + (lr - peak_lr) * (1 + math.cos(math.pi * step / rise)) / 2
    return peak_lr * (1 + math.cos(math.pi * (step - rise) / (total - rise))) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_ema(model: Net, updates: float) -> AveragedModel:
    """Exponential moving average of the weights, without dropout, over about `updates` updates.

    It starts as a plain mean: the average is never older than a tenth of what it has seen. The running
    statistics of its normalisations are not averaged: `torch.optim.swa_utils.update_bn` measures them.
    """

    def average(averages: Sequence[Tensor], values: Sequence[Tensor], seen: Tensor | int) -> None:
        weight = max(1 / updates, 1 / (1 + 0.1 * float(seen)))
        for average, value in zip(averages, values):
            average.lerp_(value, weight)

    ema = AveragedModel(model, multi_avg_fn=average)
    ema.module.scale_dropout(0)
    return ema


# ---------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all, read with suspicion


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on leaving it becomes `path` at once, after an error it is gone.

    The name is fixed, so what a killed process left there is overwritten by the next.
    """
    try:
        temporary = path.with_name(f".{path.name}.tmp")
    except ValueError as error:
        raise UserError(f"cannot write {path}: that is not a file's name") from error
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
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all; UserError if the place cannot be written."""
    buffer = io.BytesIO()  # in memory first: torch.save reports a full disk in its own, longer words
    torch.save(checkpoint, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `train.py`, never running code from it; UserError if it is not a whole and sound one."""
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch wonders at damaged headers before it refuses them
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds more than plain data and could run code when loaded") from error
    except Exception as error:  # a damaged archive makes torch raise nearly anything
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or any(type(checkpoint.get(key)) is not kind for key, kind in CONTENTS.items()):
        raise UserError(f"{path} is not a checkpoint of train.py")
    return checkpoint


def _check_archive(path: Path) -> None:
    """Refuse, before PyTorch touches it, what is missing, not a zip archive, compressed or huge."""
    try:
        size = path.stat().st_size
        if size > MAX_CHECKPOINT_BYTES:
            raise UserError(f"{path} is too large for a checkpoint of train.py: {size:,} bytes")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
                raise UserError(f"{path} is damaged or not a checkpoint of train.py (compressed or oversized entries)")
            damaged = archive.testzip()  # PyTorch writes checksums and does not check them
            if damaged:
                raise UserError(f"{path} is damaged: the checksum of its part {damaged!r} is wrong")
    except FileNotFoundError as error:
        raise UserError(
            f"no checkpoint at {path}: make one with `python train.py`, "
            "or use the released one with `--checkpoint assets/mnist_cnn.pt`"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, struct.error) as error:
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({type(error).__name__})") from error


def load_model(path: Path, device: torch.device) -> tuple[Net, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on `device`, and the checkpoint; UserError as load_checkpoint."""
    checkpoint = load_checkpoint(path)
    return place(build_model(checkpoint, path), device).eval(), checkpoint


def build_model(checkpoint: dict[str, Any], path: Path) -> Net:
    """Net with the checkpoint's architecture and weights; UserError where the two do not fit or are not finite."""
    architecture, weights = checkpoint["architecture"], checkpoint["model"]
    try:
        if not 1 <= architecture["width"] <= MAX_WIDTH:
            raise ValueError("width")
        model = Net(**architecture)
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()} != kinds:
            raise ValueError("weights")
        model.load_state_dict(weights)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} holds another architecture than this model.py ({type(error).__name__})") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{path} has weights that are not finite; train again")
    return model


def release_contents(model: Net, recipe: dict[str, Any], epoch: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """What every checkpoint carries: architecture and weights of `model`, and where they come from."""
    return {
        "architecture": model.architecture,
        "model": {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
        "recipe": recipe,
        "seed": recipe["seed"],
        "epoch": epoch,
        "metrics": metrics,
        "versions": versions(),
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; UserError if another one holds it. Ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        import fcntl
    except ImportError:  # Windows has no lock on a folder: two trainings into one --out are not refused there
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another training writes to {folder}; wait for it or choose another --out") from error
    except OSError as error:
        raise UserError(f"cannot lock {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        os.close(handle)
