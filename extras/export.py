"""Export: ONNX, and the page to draw digits on."""

from __future__ import annotations

import base64
import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

import utils
from extras import photos
from model import ACTIVATIONS, ADAPTIVE_POOLS, CLASSES, IMAGE_SIZE, Net, kernel_and_stride
from utils import UserError

PAGE = utils.ROOT / "assets" / "draw.html"


def export_onnx(model: Net, path: Path) -> str:
    """Write `model` as ONNX (opset 18, input "image", output "logits", any batch size); returns what was checked.

    Raises UserError if a package is missing, or if the file does not compute the same logits.
    """
    try:
        import onnx  # noqa: F401  # torch.onnx imports it late and complains at length
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--export needs the package {error.name}: pip install onnx onnxscript") from error
    images = torch.rand(3, 1, IMAGE_SIZE, IMAGE_SIZE)
    exported = without_adaptive_max_pools(model, images)
    if not torch.allclose(exported(images), model(images), atol=1e-5):
        raise UserError("not exported: ONNX has no adaptive max pooling, and no fixed windows do the same here")
    with utils.atomic_write(path) as temporary:
        try:
            torch.onnx.export(
                exported, (images,), str(temporary), opset_version=18, input_names=["image"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            why = utils.one_line(error)
            raise UserError(f"not exported, torch.onnx cannot express this network: {why}") from error
        return check_onnx(temporary, model, images)


def without_adaptive_max_pools(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `model` in which max pools with the same windows replace adaptive max pools, which ONNX lacks."""
    exported, sizes = copy.deepcopy(model), {}
    pools = {name: module for name, module in exported.named_modules() if isinstance(module, nn.AdaptiveMaxPool2d)}
    for pool in pools.values():
        pool.register_forward_hook(lambda pool, x, y: sizes.update({pool: (x[0].shape[-1], y.shape[-1])}))
    exported(images)
    for name, pool in pools.items():
        if pool in sizes:
            exported.set_submodule(name, nn.MaxPool2d(*kernel_and_stride(pool, *sizes[pool])))
    return exported


def check_onnx(path: Path, model: Net, images: Tensor) -> str:
    """Compare the file at `path` with `model` on `images` (N, 1, 28, 28); UserError if their logits differ."""
    try:
        import onnxruntime
    except ImportError:
        return "not checked: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.numpy()})
    difference = (torch.from_numpy(logits) - model(images).detach()).abs().max().item()
    if difference > 1e-4:
        raise UserError(f"not exported: in ONNX the logits differ by {difference:.1e} from PyTorch's")
    return f"checked with onnxruntime: logits differ by at most {difference:.1e}"


def export_page(model: Net, path: Path, checkpoint: dict[str, Any]) -> str:
    """Write assets/draw.html with the weights of `model`, of `checkpoint`, to `path`; returns what to do with it.

    Raises UserError if the page has no such layers. The page itself refuses a network whose logits it cannot repeat.
    """
    page = PAGE.read_bytes().decode()
    digit = re.search('"digit": "(.*?)"', page)[1]
    constants = {name: value for name, value in vars(photos).items() if isinstance(value, (int, float))}
    network = {**page_network(model, page, digit), "handwriting": handwriting(checkpoint)}
    parts = {"network": network, "constants": {**constants, "SURE": utils.SURE}}
    for name, part in parts.items():
        page = re.sub(f'(?<=<script id="{name}" type="application/json">).*', json.dumps(part) + "</script>", page)
    with utils.atomic_write(path) as temporary:
        temporary.write_bytes(page.encode())
    return "open it in a browser"


def handwriting(checkpoint: dict[str, Any]) -> str:
    """A sentence on what the network of `checkpoint` has learnt from; "" if that was another data set than MNIST."""
    released = utils.load_checkpoint(utils.ROOT / "assets" / "mnist_cnn.pt")
    if checkpoint["data_crc"] != released["data_crc"]:
        return ""
    strokes = ", with flags drawn onto ones, bars through sevens, tails under nines and slashes through zeros"
    return "It has learnt American handwriting (MNIST)" + strokes * checkpoint["recipe"]["variants"] + "."


def page_network(model: Net, page: str, digit: str) -> dict[str, Any]:
    """`model` as `page` reads it: shapes, weights, and its logits for `digit`, 784 bytes in base64.

    Computed in float64, so that the rounded numbers do not depend on the processor. UserError as export_page.
    """
    model = copy.deepcopy(model).cpu().double().requires_grad_(False)
    image = torch.tensor(list(base64.b64decode(digit))).view(1, 1, 28, 28).double() / 255
    try:
        if (IMAGE_SIZE, CLASSES) != (28, 10):
            raise ValueError("it is for ten digits of 28x28")
        activation, adaptive_pool = name_of(model.act, ACTIVATIONS), name_of(model.pool, ADAPTIVE_POOLS)
        if f" {activation}: " not in re.search(r"const ACTIVATIONS = \{.*?\};", page, re.DOTALL)[0]:
            raise ValueError(f"it has no activation {activation}; add it to ACTIVATIONS in assets/draw.html")
        layers = [fuse_conv_bn_eval(block.conv, block.norm) for block in model.blocks] + [model.fc1, model.fc2]
        shapes = [list(layer.weight.shape) for layer in layers]
        pools = [isinstance(block.pool, nn.MaxPool2d) for block in model.blocks]
        numbers = torch.cat([part.flatten() for layer in layers for part in (layer.weight, layer.bias)]).float().numpy()
    except (AttributeError, AssertionError, TypeError, ValueError) as error:
        blocks = "blocks of convolution, batch normalisation, max pooling and activation"
        raise UserError(f"{PAGE.name} cannot run this network, only {blocks}: {error}") from error
    return {
        "activation": activation,
        "adaptive_pool": adaptive_pool,
        "blocks": [{"shape": shape, "pool": pool} for shape, pool in zip(shapes, pools)],
        "fc1": {"shape": shapes[-2]},
        "fc2": {"shape": shapes[-1]},
        "digit": digit,
        "logits": [round(logit, 3) for logit in model(image)[0].tolist()],
        "weights": base64.b64encode(numbers.astype("<f4").tobytes()).decode(),
    }


def name_of(module: nn.Module, kinds: dict[str, type]) -> str:
    """The name of the module's class in `kinds`; its own name if it is not there."""
    return next((name for name, kind in kinds.items() if type(module) is kind), type(module).__name__)
