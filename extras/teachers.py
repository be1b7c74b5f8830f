"""Distillation (Hinton et al., 2015): a training that also learns from other networks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from utils import UserError

WEIGHT = 0.7  # of the teachers in the loss


def find(paths: Sequence[str], out: Path) -> list[str]:
    """The checkpoints of `paths`, which may be folders of runs, for a training into `out`.

    UserError if one is missing, or would be overwritten.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():  # perhaps moved since the training began
            raise UserError(f"the teacher {path} is not there; name its place with --teacher")
        found += [run.resolve() for run in utils.find_runs(path)]
    if (out / "model.pt").resolve() in found or (out / "last.pt").resolve() in found:
        raise UserError(f"{out} holds a --teacher of this training; choose another --out")
    return list(map(str, found))


def make_loss(recipe: dict[str, Any], device: torch.device) -> Callable[..., Tensor]:
    """The loss of logits (B, 10), labels (B,) and images (B, 1, 28, 28): a number.

    (1 - WEIGHT) * cross-entropy with the labels + WEIGHT * cross-entropy with the teachers' mean
    probabilities (temperature 1).
    """
    teachers = [utils.load_model(path, device)[0] for path in recipe["teacher"]]

    def loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            soft = torch.stack([teacher(images).softmax(1) for teacher in teachers]).mean(0)
        return torch.lerp(F.cross_entropy(logits, labels), F.cross_entropy(logits, soft), WEIGHT)

    return loss
