"""A folder of pictures as the data set: DIR/train/LABEL/*.png and DIR/test/LABEL/*.png."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import utils
from model import CLASS_NAMES, IMAGE_SIZE
from utils import UserError


def load(data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """The training or the test images, uint8 (N, H, W), and their labels, int64 (N,).

    UserError for no images, too many classes, or a picture that does not fit.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    labels = {name: label for label, name in enumerate(class_names(data_dir))}
    folder = data_dir / ("train" if train else "test")
    # (path, label), in the same order on each machine
    samples = make_dataset(folder, labels, IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise UserError(f"{folder} has no pictures")
    bar = tqdm(samples, f"Reading {data_dir}", leave=False, delay=2, disable=None)
    images = np.stack([read(path) for path, _ in bar])
    return torch.from_numpy(images), torch.tensor([label for _, label in samples])


def class_names(data_dir: Path) -> list[str]:
    """CLASS_NAMES if every LABEL is in them, else the LABELs, sorted as numbers or as text."""
    folders = [*data_dir.glob("train/[!.]*"), *data_dir.glob("test/[!.]*")]
    names = sorted({path.name for path in folders if path.is_dir()})
    if len(names) > len(CLASS_NAMES):
        raise UserError(f"{data_dir} has {len(names)} classes: edit CLASS_NAMES in model.py")
    if set(names) <= set(CLASS_NAMES):
        return list(CLASS_NAMES)
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def read(path: str) -> np.ndarray:
    """A picture in grey, uint8 (H, W)."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L"))
    except Exception as error:  # of many kinds
        raise UserError(f"cannot read {path}: {utils.one_line(error)}") from error
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f"{path} is not {IMAGE_SIZE} x {IMAGE_SIZE} pixels, IMAGE_SIZE in model.py")
    return pixels
