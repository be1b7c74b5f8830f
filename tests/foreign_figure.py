"""README's picture of drawn ones, sevens and nines: `python tests/foreign_figure.py assets/foreign.png`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from visualize_errors import MUTED, STYLE, save, sheet, show_image  # noqa: E402

COLUMNS = 12


def main() -> None:
    """Write the picture to the path on the command line."""
    digits = utils.load_mnist(ROOT / "data", train=True, device=torch.device("cpu"))
    drawn = utils.draw_foreign_shapes(digits, share=0.25, seed=0)
    changed = (digits.images != drawn.images).flatten(1).any(1)
    plt.rcParams.update(STYLE)
    figure, axes = sheet(
        "Ones with a flag, sevens with a bar, nines with a tail",
        "MNIST's training images, and the same with what much of the world adds to them",
        rows=6, columns=COLUMNS, panel=0.8, gap=(0.08, 0.26),
    )  # fmt: skip
    for digit, (before, after) in zip((1, 7, 9), axes.reshape(3, 2, COLUMNS)):
        chosen = (changed & (digits.labels == digit)).nonzero().squeeze(1)[:COLUMNS]
        for row, images, label in ((before, digits.images, "MNIST"), (after, drawn.images, "drawn")):
            for axis, image in zip(row, images[chosen, 0]):
                show_image(axis, image)
            row[0].set_title(label, loc="left", color=MUTED)
    save(figure, Path(sys.argv[1]))


if __name__ == "__main__":
    matplotlib.use("Agg")
    main()
