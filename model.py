"""The network: four convolutional blocks, adaptive pooling, two linear layers; 16,966 parameters.

`python model.py` prints its layer table, computed from the module itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

IMAGE_SIZE = 28  # pixels a side
CLASS_NAMES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
MAX_WIDTH = 32  # so that a checkpoint from elsewhere cannot fill the memory
PRETRAINED = Path(__file__).resolve().parent / "assets" / "mnist_cnn.pt"


class Net(nn.Module):
    """A 4-block CNN for MNIST.

    Input: float (N, 1, 28, 28), ink 1, paper 0. Output: logits (N, 10).

    Args:
        width: factor of all hidden widths, 1 to MAX_WIDTH; else ValueError.
        activation: "silu" (Elfwing et al., 2018) or "relu".
        dropout: rates of the four blocks.
        fc_dropout: rate between the two linear layers.
    """

    def __init__(
        self,
        width: int = 1,
        activation: str = "silu",
        dropout: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
        fc_dropout: float = 0.4,
    ) -> None:
        super().__init__()
        if not 1 <= width <= MAX_WIDTH:
            raise ValueError(f"width {width} is not from 1 to {MAX_WIDTH}")
        act = ACTIVATIONS[activation]
        p1, p2, p3, p4 = dropout
        self.blocks = nn.Sequential(
            Block(1, 12 * width, 3, nn.MaxPool2d(2), act(), p1),
            Block(12 * width, 24 * width, 3, nn.MaxPool2d(2), act(), p2),
            Block(24 * width, 24 * width, 3, nn.Identity(), act(), p3),
            Block(24 * width, 12 * width, 1, nn.Identity(), act(), p4),
        )
        self.pool = nn.AdaptiveMaxPool2d(3)
        self.fc1 = nn.Linear(12 * width * 3 * 3, 72 * width)
        self.act = act()
        self.dropout = nn.Dropout(fc_dropout)
        self.fc2 = nn.Linear(72 * width, len(CLASS_NAMES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(x)).flatten(1)
        x = self.dropout(self.act(self.fc1(x)))
        return self.fc2(x)


class Block(nn.Module):
    """Convolution, batch normalisation, pooling, activation, dropout.

    Input: (N, c_in, H, W). Output: (N, c_out, h, w); only `pool` changes the size. Pooling comes
    before the activation because that is cheaper. With ReLU the order makes no difference.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, pool: nn.Module, act: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(c_out)
        self.pool = pool
        self.act = act
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.act(self.pool(self.norm(self.conv(x)))))


def load_pretrained(path: str | Path = PRETRAINED) -> Net:
    """The released network, or that of another checkpoint, in eval mode on the CPU.

    Its input: float (N, 1, 28, 28), ink 1, paper 0, as torchvision's `ToTensor` makes of MNIST.
    Its output: logits (N, 10). Digits should fit 20 x 20 pixels, centred by mass.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    recipe = checkpoint["recipe"]
    model = Net(width=recipe["width"], activation=recipe["activation"])
    model.load_state_dict(checkpoint["model"])
    return model.eval()


# --- The layer table ---


class Layer(NamedTuple):
    """One row of the table. Receptive field and jumps are in pixels of the image."""

    name: str
    input_size: tuple[int, ...]  # (C, H, W), or (features,)
    output_size: tuple[int, ...]
    receptive_field: int | None
    jump_in: int | None
    jump_out: int | None
    parameters: tuple[int, ...]  # (weight, bias); a norm's are summed


def layer_table(model: nn.Module) -> list[Layer]:
    """The layers of `model`, in the order in which an image passes them.

    Receptive fields: r_out = r_in + (k - 1) * jump_in and jump_out = stride * jump_in (Araujo et
    al., "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019). They
    are None from the first layer on whose input size is not the previous output's.
    """
    model = copy.deepcopy(model).eval()
    image = (1, IMAGE_SIZE, IMAGE_SIZE)
    rows = [Layer("Input", image, image, 1, 1, 1, ())]
    kinds: list[str] = []

    def add_row(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kind = type(layer).__name__.replace("2d", "").replace("Linear", "FC")
        kinds.append(kind)
        name = "AdaptivePool" if kind.startswith("Adaptive") else f"{kind}{kinds.count(kind)}"
        size_in = tuple(inputs[0].shape[1:])
        size_out = tuple(output.shape[1:])
        before = rows[-1]
        field = jump_in = jump_out = None
        if before.receptive_field and size_in == before.output_size:
            kernel, stride = kernel_and_stride(layer, size_in[1], size_out[1])
            jump_in = before.jump_out
            jump_out = stride * jump_in
            field = before.receptive_field + (kernel - 1) * jump_in
        parameters = tuple(p.numel() for p in layer.parameters())
        if kind.endswith("Norm"):
            parameters = (sum(parameters),)
        rows.append(Layer(name, size_in, size_out, field, jump_in, jump_out, parameters))

    for layer in model.modules():
        is_leaf = not list(layer.children())
        if is_leaf and (hasattr(layer, "weight") or "Pool" in type(layer).__name__):
            layer.register_forward_hook(add_row)
    with torch.no_grad():
        model(next(model.parameters()).new_zeros(1, *image))
    return rows


def kernel_and_stride(layer: nn.Module, size_in: int, size_out: int) -> tuple[int, int]:
    """Kernel size (with dilation) and stride of `layer`, in pixels of its input."""
    if isinstance(layer, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        starts = [i * size_in // size_out for i in range(size_out)]  # as PyTorch cuts its windows
        ends = [math.ceil((i + 1) * size_in / size_out) for i in range(size_out)]
        kernel = max(end - start for start, end in zip(starts, ends))
        return kernel, size_in // size_out

    def setting(name: str) -> int:
        value = getattr(layer, name, 1)
        return value if isinstance(value, int) else value[0]

    return setting("dilation") * (setting("kernel_size") - 1) + 1, setting("stride")


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def format_table(rows: list[Layer]) -> str:
    """The layer table as Markdown, aligned for the terminal, in the specification's columns."""

    def size(shape: tuple[int, ...]) -> str:
        return f"{shape[1]}x{shape[2]}x{shape[0]}" if len(shape) == 3 else str(shape[0])

    lines = [("Layer", "Input Size", "Output Size", "RF", "Jump In", "Jump Out", "Parameters")]
    for row in rows:
        numbers = (str(n or "-") for n in (row.receptive_field, row.jump_in, row.jump_out))
        parameters = " + ".join(f"{p:,}" for p in row.parameters) or "0"
        lines.append((row.name, size(row.input_size), size(row.output_size), *numbers, parameters))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    padded = [map(str.ljust, line, widths) for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def main() -> None:
    model = Net()
    print(format_table(layer_table(model)))
    print(f"\nParameters: {count_parameters(model):,}")


if __name__ == "__main__":
    main()
