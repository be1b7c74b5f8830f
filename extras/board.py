"""`train.py --tensorboard`: curves, images and hyperparameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import utils
from utils import UserError


class Board:
    """What TensorBoard shows of one training.

    Args:
        folder: of the event files.
        run: of train.py; a batch of its training images is written.

    Raises UserError if the package is missing, or `folder` cannot be written.
    """

    def __init__(self, folder: Path, run: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from error
        epochs = len(run.history)
        with utils.writing(folder):
            # purge_step hides later epochs of an earlier training into the same folder.
            self.writer = SummaryWriter(str(folder), purge_step=epochs + 1)
        images, _, _ = next(run.loader.batches(epochs))
        self.writer.add_images("augmented images", images.clamp(0, 1))

    def log_epoch(self, entry: dict[str, Any]) -> None:
        """Write an entry of the history. Training and validation share the charts."""
        for name, value in entry.items():
            if isinstance(value, list):
                continue
            part, _, rest = name.partition("_")
            chart = f"{rest}/{part}" if part in ("train", "val") else name
            self.writer.add_scalar(chart, value, entry["epoch"])

    def finish(self, recipe: dict[str, Any], metrics: dict[str, float]) -> None:
        """Write the hyperparameters with the final accuracies."""
        settings = {
            name: str(value) if isinstance(value, list) else value
            for name, value in recipe.items()
        }
        finals = {f"final/{name}": value for name, value in metrics.items()}
        self.writer.add_hparams(settings, finals, run_name=".")
        self.writer.close()
