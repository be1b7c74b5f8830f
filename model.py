"""The network: four convolutional blocks, adaptive pooling, two linear layers; 16,966 parameters.

`python model.py` prints its layer table, computed from the module itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

IMAGE_SIZE = 28  # pixels a side
CLASSES = 10
MAX_WIDTH = 32
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
ADAPTIVE_POOLS = {"avg": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}


class Net(nn.Module):
    """The specification's 4-block CNN for MNIST. Input float (N, 1, 28, 28), ink 1, paper 0; output logits (N, 10).

    Args:
        width: factor of every hidden layer's width, 1 to 32; 1 is the network of 16,966 parameters.
        activation: "silu" (Elfwing et al., 2018) or "relu".
        adaptive_pool: "max" or "avg"; its output is 3x3.
        dropout: rates of the four blocks.
        fc_dropout: rate between the two linear layers.

    Raises ValueError for a width out of range.
    """

    def __init__(
        self,
        width: int = 1,
        activation: str = "silu",
        adaptive_pool: str = "max",
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
        self.pool = ADAPTIVE_POOLS[adaptive_pool](3)
        self.fc1 = nn.Linear(12 * width * 3 * 3, 72 * width)
        self.act = act()
        self.dropout = nn.Dropout(fc_dropout)
        self.fc2 = nn.Linear(72 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(x)).flatten(1)
        x = self.dropout(self.act(self.fc1(x)))
        return self.fc2(x)


class Block(nn.Module):
    """Convolution (with bias), batch normalisation, pooling, activation, dropout: (N, c_in, H, W) -> (N, c_out, h, w).

    The convolution keeps the size, `pool` may change it. With pooling first, the activation is four times cheaper.
    For ReLU both orders are the same function, for SiLU they are not.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, pool: nn.Module, act: nn.Module, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(c_out)
        self.pool = pool
        self.act = act
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.act(self.pool(self.norm(self.conv(x)))))


def load_pretrained() -> Net:
    """The released network, `assets/mnist_cnn.pt`, in eval mode on the CPU.

    Input: float (N, 1, 28, 28), ink 1, paper 0, as `torchvision.transforms.ToTensor` makes it of an MNIST image.
    The digit fits into 20 x 20 pixels, and its centre of mass is in the middle. Output: logits (N, 10).
    """
    path = Path(__file__).resolve().parent / "assets" / "mnist_cnn.pt"
    model = Net()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    return model.eval()


# --- The layer table --------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One row of the table. Sizes are (C, H, W) or (features,); receptive field and jumps are in input pixels."""

    name: str
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    rf: int | None
    jump_in: int | None
    jump_out: int | None
    parameters: tuple[int, ...]
    macs: int


def layer_table(model: nn.Module) -> list[Layer]:
    """Run one blank image through `model` and describe each layer in the order of execution.

    Receptive fields: r_out = r_in + (k - 1) * jump_in and jump_out = stride * jump_in (Araujo et al., "Computing
    Receptive Fields of Convolutional Neural Networks", Distill 2019). They are None where a layer's input has
    another size than the output before it, as after most branches. Activations and dropout have no row.
    """
    image = (1, IMAGE_SIZE, IMAGE_SIZE)
    rows = [Layer("Input", image, image, 1, 1, 1, (), 0)]
    kinds: list[str] = []

    def describe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = type(module).__name__
        kind = "FC" if name == "Linear" else "AdaptivePool" if name.startswith("Adaptive") else name.replace("2d", "")
        kinds.append(kind)
        size_in, size_out = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
        before, rf, jump_in, jump_out = rows[-1], None, None, None
        if len(size_in) == 3 and size_in == before.output_size and before.rf:
            kernel, stride = kernel_and_stride(module, size_in[1], size_out[1])
            jump_in = before.jump_out
            rf, jump_out = before.rf + (kernel - 1) * jump_in, stride * jump_in
        parameters = tuple(p.numel() for p in module.parameters())
        macs = 0
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            macs = module.weight.numel() * output[0].numel() // output.shape[1]
        if kind.endswith("Norm"):
            parameters = (sum(parameters),)
        name = kind if kind == "AdaptivePool" else f"{kind}{kinds.count(kind)}"
        rows.append(Layer(name, size_in, size_out, rf, jump_in, jump_out, parameters, macs))

    leaves = [module for module in model.modules() if not list(module.children())]
    layers = [leaf for leaf in leaves if hasattr(leaf, "weight") or "Pool" in type(leaf).__name__]
    hooks = [layer.register_forward_hook(describe) for layer in layers]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(next(model.parameters()).new_zeros(1, *image))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return rows


def kernel_and_stride(module: nn.Module, size_in: int, size_out: int) -> tuple[int, int]:
    """The width of the window that `module` slides over its input, and its step."""
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        starts = [i * size_in // size_out for i in range(size_out)]
        ends = [-(-(i + 1) * size_in // size_out) for i in range(size_out)]
        return max(end - start for start, end in zip(starts, ends)), size_in // size_out

    def side(name: str) -> int:
        value = getattr(module, name, 1)
        return value if isinstance(value, int) else value[0]

    return side("dilation") * (side("kernel_size") - 1) + 1, side("stride")


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def format_table(rows: list[Layer]) -> str:
    """The layer table as Markdown, aligned for the terminal, in the specification's columns."""

    def size(shape: tuple[int, ...]) -> str:
        return f"{shape[1]}x{shape[2]}x{shape[0]}" if len(shape) == 3 else str(shape[0])

    def cell(value: int | None) -> str:
        return "-" if value is None else str(value)

    lines = [("Layer", "Input Size", "Output Size", "RF", "Jump In", "Jump Out", "Parameters")]
    for row in rows:
        parameters = " + ".join(f"{p:,}" for p in row.parameters) or "0"
        numbers = [cell(value) for value in (row.rf, row.jump_in, row.jump_out)]
        lines.append((row.name, size(row.input_size), size(row.output_size), *numbers, parameters))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(text.ljust(w) for text, w in zip(line, widths)) + " |" for line in lines)


def main() -> None:
    argparse.ArgumentParser(description="Print the layer table of the network. Takes no flags.").parse_args()
    model = Net()
    rows = layer_table(model)
    print(format_table(rows))
    print(f"\nParameters:           {count_parameters(model):>9,}")
    print(f"Multiply-accumulates: {sum(row.macs for row in rows):>9,} per image")
    if any(row.rf is None for row in rows if len(row.input_size) == 3):
        print("RF and jumps are not computed after a branch.")


if __name__ == "__main__":
    main()
