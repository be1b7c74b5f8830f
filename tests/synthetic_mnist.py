"""Make a small data set in MNIST's format, without network: `python tests/synthetic_mnist.py DIR`.

Printed digits in the fonts that come with matplotlib, each at a random place, size and slant.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmtt10",
)  # fmt: skip


def draw_digit(digit: int, rng: np.random.Generator) -> np.ndarray:
    """One digit, uint8 (28, 28), ink bright on black."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(folder / f"{rng.choice(FONTS)}.ttf"), int(rng.integers(20, 27)))
    image = Image.new("L", (28, 28))
    x, y = 14 + rng.uniform(-3, 3, 2)
    ImageDraw.Draw(image).text((x, y), str(digit), fill=255, font=font, anchor="mm")
    return np.asarray(image.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR))


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 `array` in the IDX format of MNIST's files."""
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def make_dataset(folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Write the four files to `folder`/MNIST/raw, so that `folder` serves as --data-dir; returns `folder`."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, count)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
        write_idx(raw / f"{part}-images-idx3-ubyte", np.stack([draw_digit(label, rng) for label in labels]))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write MNIST/raw/")
    parser.add_argument("--train", type=int, default=6000, help="training images (default: %(default)s)")
    parser.add_argument("--test", type=int, default=1000, help="test images (default: %(default)s)")
    args = parser.parse_args()
    make_dataset(args.folder, args.train, args.test)
    print(f"Wrote {args.train} training and {args.test} test images; use them with --data-dir {args.folder}")


if __name__ == "__main__":
    main()
