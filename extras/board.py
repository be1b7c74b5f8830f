"""`train.py --tensorboard`: curves, images and hyperparameters."""

from pathlib import Path
from typing import Any

import utils
from utils import UserError


class Board:
    """Writes a `run` of train.py into `folder` for TensorBoard; UserError if that fails."""

    def __init__(self, folder: Path, run: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from error
        epoch = len(run.history)
        with utils.writing(folder):
            # purge_step hides an earlier training's entries from this epoch on.
            self.writer = SummaryWriter(str(folder), purge_step=epoch + 1)
        images, _, _ = next(run.loader.batches(epoch))
        self.writer.add_images("augmented images", images)

    def log_epoch(self, entry: dict[str, Any]) -> None:
        """Write the numbers of an entry of the history, in sections for loss and accuracy."""
        for name, value in entry.items():
            if isinstance(value, float):
                split, _, measure = name.partition("_")
                chart = f"{measure}/{split}" if split in ("train", "val") else name
                self.writer.add_scalar(chart, value, entry["epoch"])

    def finish(self, recipe: dict[str, Any], metrics: dict[str, float]) -> None:
        """Write the hyperparameters with the final accuracies."""
        settings = {k: str(v) if isinstance(v, list) else v for k, v in recipe.items()}
        finals = {f"final/{name}": value for name, value in metrics.items()}
        self.writer.add_hparams(settings, finals, run_name=".")
        self.writer.close()
