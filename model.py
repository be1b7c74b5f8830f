"""The network: four convolutional blocks, adaptive pooling, two linear layers; 16,966 parameters.

`python model.py` prints its layer table, computed from the module itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
ADAPTIVE_POOLS = {"avg": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}


def _tile(scale: Tensor, shift: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Two (C,) -> two (times * C,): long rows vectorise, rows of 12 channels do not."""
    scale, shift = torch.stack([scale, shift]).unsqueeze(1).expand(2, times, -1).reshape(2, -1).unbind()
    return scale, shift


def _channel_sums(a: Tensor, b: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Sums of a and of a * b, both (R, W * C), over all but the channel: two (C,)."""
    first, second = torch.stack([a.sum(0), (a * b).sum(0)]).view(2, -1, channels).sum(1).unbind()
    return first, second


class BatchNormMaxPool(torch.autograd.Function):
    """Training-mode batch normalisation and 2x2 max pooling in one pass over channels-last memory.

    A scale that is not negative commutes with max pooling, so the raw input is pooled and only
    that quarter is normalised; the statistics are still those of the whole input. Equal to
    `BatchNorm2d` followed by `MaxPool2d(2)` up to rounding, several times as fast on a CPU.

    x (N, C, H, W) with even H and W, weight >= 0 and bias (C,) -> pooled output
    (N, C, H/2, W/2), and the batch mean and biased variance (C,), which carry no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(n * h, w * c)
        mean, mean_square = (total / (n * h * w) for total in _channel_sums(rows, rows, c))
        var = (mean_square - mean * mean).clamp_(min=0)
        inv_std = (var + eps).rsqrt()
        scale = weight * inv_std

        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        pooled_rows = pooled.permute(0, 2, 3, 1).reshape(-1, w // 2 * c)
        scales, shifts = _tile(scale, bias - mean * scale, w // 2)
        out = torch.addcmul(shifts, pooled_rows, scales)
        ctx.save_for_backward(x, pooled_rows, indices, mean, inv_std, scale, scales)
        ctx.mark_non_differentiable(mean, var)
        return out.view(n, h // 2, w // 2, c).permute(0, 3, 1, 2), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, pooled_rows, indices, mean, inv_std, scale, scales = ctx.saved_tensors
        n, c, h, w = x.shape
        grad_rows = grad.permute(0, 2, 3, 1).reshape(-1, w // 2 * c)
        grad_bias, grad_scale = _channel_sums(grad_rows, pooled_rows, c)
        grad_weight = (grad_scale - mean * grad_bias) * inv_std

        # dL/dx = scale * (scattered grad - mean(grad) - x_hat * mean(grad * x_hat)): affine in x plus a scatter.
        slope = -scale * inv_std * grad_weight / (n * h * w)
        slopes, shifts = _tile(slope, -scale * grad_bias / (n * h * w) - slope * mean, w)
        rows = x.permute(0, 2, 3, 1).reshape(n * h, w * c)
        grad_x = torch.addcmul(shifts, rows, slopes).view(n, h, w, c).permute(0, 3, 1, 2)
        scaled = (grad_rows * scales).view(n, h // 2, w // 2, c).permute(0, 3, 1, 2)
        grad_x += F.max_unpool2d(scaled, indices, 2)
        return grad_x, grad_weight, grad_bias, None


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al., 2014) whose rate `p` may change while training.

    On a CPU the masks come 16 random bits an element, four elements from each 64-bit number of
    PyTorch's default generator: several times as fast as `nn.Dropout`, with `p` exact to 1 / 65,536.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.int16)[: x.numel()] >= round(self.p * 2**16) - 2**15
        mask = torch.empty_like(x)  # dense whatever the strides of x, in its memory format
        mask.copy_(keep.as_strided(mask.shape, mask.stride())).mul_(1 / (1 - self.p))
        return x * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Block(nn.Module):
    """Convolution (with bias), batch normalisation, 2x2 max pooling if `pool`, activation, dropout.

    (N, C_in, H, W) -> (N, C_out, H, W), or (N, C_out, H/2, W/2) with pooling. Pooling comes before
    the activation: for ReLU that is the same function at a quarter of the work.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, pool: bool, activation: str, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(c_out)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.act = ACTIVATIONS[activation]()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.device.type == "cpu" and isinstance(self.pool, nn.MaxPool2d):
            x = self._fused(x)
        else:
            x = self.pool(self.norm(self.conv(x)))
        return self.dropout(self.act(x))

    def _fused(self, x: Tensor) -> Tensor:
        """What conv, norm and pool do one after another, running statistics included."""
        norm = self.norm
        filters, offsets, scale = self.conv.weight, self.conv.bias, norm.weight
        negative = scale.detach() < 0
        sign = torch.where(negative, -1.0, 1.0).to(scale.dtype) if negative.any() else None
        if sign is not None:
            # Negating a filter and its scale leaves the block's function as it is, and then scale and max commute.
            filters, offsets, scale = filters * sign.view(-1, 1, 1, 1), offsets * sign, scale * sign
        x = F.conv2d(x, filters, offsets, padding=self.conv.padding)
        count = x.numel() // x.shape[1]
        x, mean, var = BatchNormMaxPool.apply(x, scale, norm.bias, norm.eps)
        with torch.no_grad():
            norm.num_batches_tracked += 1
            weight = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean if sign is None else mean * sign, weight)
            norm.running_var.lerp_(var * (count / (count - 1)), weight)
        return x


class Net(nn.Module):
    """The seed's 4-block CNN for MNIST. Input float (N, 1, 28, 28), output logits (N, 10).

    Args:
        width: multiplies every hidden layer's width; 1 is the network of 16,966 parameters, wider ones are teachers.
        activation: "silu" (Elfwing et al., 2018) or "relu".
        adaptive_pool: "max" or "avg", 7x7 -> 3x3.
        dropout: rates of blocks 1 to 4 and, last, between the two linear layers.
    """

    def __init__(
        self,
        width: int = 1,
        activation: str = "silu",
        adaptive_pool: str = "max",
        dropout: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.4),
    ) -> None:
        super().__init__()
        self.architecture = {"width": width, "activation": activation, "adaptive_pool": adaptive_pool}
        self.dropout_rates = tuple(dropout)
        d1, d2, d3, d4, d5 = self.dropout_rates
        self.block1 = Block(1, 12 * width, 3, pool=True, activation=activation, dropout=d1)
        self.block2 = Block(12 * width, 24 * width, 3, pool=True, activation=activation, dropout=d2)
        self.block3 = Block(24 * width, 24 * width, 3, pool=False, activation=activation, dropout=d3)
        self.block4 = Block(24 * width, 12 * width, 1, pool=False, activation=activation, dropout=d4)
        self.pool = ADAPTIVE_POOLS[adaptive_pool](3)
        self.fc1 = nn.Linear(12 * width * 3 * 3, 72 * width)
        self.act = ACTIVATIONS[activation]()
        self.dropout = Dropout(d5)
        self.fc2 = nn.Linear(72 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            x = block(x)
        x = self.pool(x).flatten(1)
        x = self.dropout(self.act(self.fc1(x)))
        return self.fc2(x)

    def blocks(self) -> list[Block]:
        """The four convolutional blocks."""
        return [self.block1, self.block2, self.block3, self.block4]

    def scale_dropout(self, factor: float) -> None:
        """Set each dropout rate to `factor` (0 to 1) times the rate given to the constructor."""
        layers = [m for m in self.modules() if isinstance(m, Dropout)]
        for layer, rate in zip(layers, self.dropout_rates):
            layer.p = rate * factor


def load_pretrained() -> Net:
    """The released network (`assets/mnist_cnn.pt`), in eval mode on the CPU.

    Its input is float (N, 1, 28, 28): bright ink on black, 0 to 1, in MNIST's framing (the digit fits
    20 x 20 pixels, its centre of mass in the middle), divided by 0.3081 with no mean subtracted, which is
    what `utils.normalize` does. Its output is logits (N, 10). Raises utils.UserError if the file is
    missing or damaged.
    """
    from utils import load_model  # utils imports this module

    return load_model(Path(__file__).resolve().parent / "assets" / "mnist_cnn.pt", torch.device("cpu"))[0]


class Layer(NamedTuple):
    """One row of the layer table; sizes are (C, H, W) or (features,), `rf` and jumps in input pixels."""

    name: str
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    rf: int | None
    jump_in: int | None
    jump_out: int | None
    parameters: tuple[int, ...]
    macs: int


def window(module: nn.Module, size_in: int, size_out: int) -> tuple[int, int]:
    """Kernel and stride with which `module` slides over its input; adaptive pooling's follow from the sizes."""
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        starts = [i * size_in // size_out for i in range(size_out)]
        ends = [-(-(i + 1) * size_in // size_out) for i in range(size_out)]
        return max(e - s for s, e in zip(starts, ends)), starts[1] - starts[0]
    if isinstance(module, nn.BatchNorm2d):
        return 1, 1
    kernel, stride = module.kernel_size, module.stride
    return (kernel if isinstance(kernel, int) else kernel[0]), (stride if isinstance(stride, int) else stride[0])


def layer_table(model: Net) -> list[Layer]:
    """Run one blank image through `model` and describe each layer in the order of execution.

    Receptive fields by r_out = r_in + (k - 1) * jump_in and jump_out = stride * jump_in
    (Araujo et al., "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019).
    """
    names = {
        nn.Conv2d: "Conv", nn.BatchNorm2d: "BatchNorm", nn.MaxPool2d: "MaxPool", nn.Linear: "FC",
        nn.AdaptiveAvgPool2d: "AdaptivePool", nn.AdaptiveMaxPool2d: "AdaptivePool",
    }  # fmt: skip
    seen: dict[str, int] = {}
    rows = [Layer("Input", (1, 28, 28), (1, 28, 28), 1, 1, 1, (), 0)]

    def describe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kind = names[type(module)]
        seen[kind] = seen.get(kind, 0) + 1
        size_in, size_out = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
        rf, jump_in, jump_out = rows[-1].rf, rows[-1].jump_out, None
        if isinstance(module, nn.Linear):
            rf = jump_in = None
        else:
            kernel, stride = window(module, size_in[1], size_out[1])
            rf, jump_out = rf + (kernel - 1) * jump_in, stride * jump_in
        parameters = tuple(p.numel() for p in module.parameters())
        macs = 0
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            macs = module.weight.numel() * (output[0, 0].numel() if output.dim() == 4 else 1)
        if kind == "BatchNorm":
            parameters = (sum(parameters),)
        name = kind if kind == "AdaptivePool" else f"{kind}{seen[kind]}"
        rows.append(Layer(name, size_in, size_out, rf, jump_in, jump_out, parameters, macs))

    hooks = [m.register_forward_hook(describe) for m in model.modules() if type(m) in names]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(next(model.parameters()).new_zeros(1, 1, 28, 28))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return rows


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def format_table(rows: list[Layer]) -> str:
    """The layer table as Markdown, aligned for the terminal, in the seed's columns."""

    def size(shape: tuple[int, ...]) -> str:
        return f"{shape[1]}x{shape[2]}x{shape[0]}" if len(shape) == 3 else str(shape[0])

    def cell(value: int | None) -> str:
        return "-" if value is None else str(value)

    header = ("Layer", "Input Size", "Output Size", "RF", "Jump In", "Jump Out", "Parameters")
    lines = [header] + [
        (r.name, size(r.input_size), size(r.output_size), cell(r.rf), cell(r.jump_in), cell(r.jump_out),
         " + ".join(f"{p:,}" for p in r.parameters) or "0")
        for r in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, tuple("-" * w for w in widths))
    return "\n".join("| " + " | ".join(text.ljust(w) for text, w in zip(line, widths)) + " |" for line in lines)


def main() -> None:
    model = Net()
    rows = layer_table(model)
    print(format_table(rows))
    print(f"\nParameters:           {count_parameters(model):>9,}")
    print(f"Multiply-accumulates: {sum(r.macs for r in rows):>9,} per image")


if __name__ == "__main__":
    main()
