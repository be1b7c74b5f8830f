"""Export: ONNX, and the page to draw digits on."""

import base64
import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import utils
from extras import photos
from model import ACTIVATIONS, CLASS_NAMES, IMAGE_SIZE, PRETRAINED, Net, kernel_and_stride
from utils import UserError

PAGE = utils.ROOT / "assets" / "draw.html"


def export_onnx(model: Net, path: Path) -> None:
    """Write `model` as ONNX of any batch size.

    UserError if a package is missing, or the file computes other logits.
    """
    try:
        import onnxscript  # noqa: F401
        from onnx.reference import ReferenceEvaluator
    except ImportError as error:
        raise UserError("ONNX needs packages: pip install onnx onnxscript") from error
    images = torch.rand(3, 1, IMAGE_SIZE, IMAGE_SIZE)
    exported = copy.deepcopy(model)
    if isinstance(getattr(model, "pool", None), nn.AdaptiveMaxPool2d):  # which ONNX lacks
        x = model.blocks(images)
        kernel, stride = kernel_and_stride(model.pool, x.shape[-1], model.pool(x).shape[-1])
        exported.pool = nn.MaxPool2d(kernel, stride)  # the same if all windows are equally wide
    with utils.atomic_write(path) as temporary:
        try:
            torch.onnx.export(
                exported, (images,), str(temporary),
                opset_version=18, dynamo=True, external_data=False, verbose=False,
                input_names=["image"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"not exported: {utils.one_line(error)}") from error
        (logits,) = ReferenceEvaluator(str(temporary)).run(None, {"image": images.numpy()})
        if not torch.allclose(torch.from_numpy(logits), model(images), atol=1e-4):
            raise UserError("not exported: ONNX computes other logits")


def export_page(model: Net, path: Path, checkpoint: dict[str, Any]) -> None:
    """Write assets/draw.html with `model` in it; UserError if the page lacks its layers.

    The page itself refuses a network whose logits it cannot repeat.
    """
    page = PAGE.read_bytes().decode()
    digit = re.search('"digit": "(.*?)"', page)[1]  # to check logits on: 784 bytes in base64
    # The page does what photos.py does, with its numbers.
    constants = {k: v for k, v in vars(photos).items() if isinstance(v, (int, float))}
    constants["SURE"] = utils.SURE
    network = {**page_network(model, page, digit), "handwriting": handwriting(checkpoint)}
    for name, value in (("network", network), ("constants", constants)):
        tag = f'<script id="{name}" type="application/json">'
        page = re.sub(f"{tag}.*", f"{tag}{json.dumps(value)}</script>", page)
    with utils.atomic_write(path) as temporary:
        temporary.write_bytes(page.encode())


def handwriting(checkpoint: dict[str, Any]) -> str:
    """A sentence on what it has learnt from; "" if that was not MNIST."""
    if checkpoint["data_crc"] != utils.load_checkpoint(PRETRAINED)["data_crc"]:
        return ""
    strokes = ""
    if checkpoint["recipe"]["variants"]:
        strokes = (", with flags drawn onto ones, bars through sevens, tails under nines and "
                   "slashes through zeros")
    return f"It has learnt American handwriting (MNIST){strokes}."


def page_network(model: Net, page: str, digit: str) -> dict[str, Any]:
    """`model` as `page` reads it, with its logits for `digit`.

    In float64, so that the file is the same on each processor.
    """
    model = copy.deepcopy(model).cpu().double().requires_grad_(False)
    image = torch.tensor(list(base64.b64decode(digit))).view(1, 1, 28, 28).double() / 255
    try:
        if (IMAGE_SIZE, len(CLASS_NAMES)) != (28, 10):
            raise ValueError("it is for ten digits of 28x28")
        names = {kind: name for name, kind in ACTIVATIONS.items()}
        activation = names.get(type(model.act), type(model.act).__name__)
        if f" {activation}: " not in re.search("ACTIVATIONS = {[^}]*", page)[0]:
            raise ValueError(f"it lacks {activation}; add it to ACTIVATIONS in assets/draw.html")
        blocks = [
            {"shape": list(b.conv.weight.shape), "pool": isinstance(b.pool, nn.MaxPool2d)}
            for b in model.blocks
        ]
        layers = [fuse_conv_bn_eval(b.conv, b.norm) for b in model.blocks] + [model.fc1, model.fc2]
        weights = torch.cat([p.flatten() for layer in layers for p in (layer.weight, layer.bias)])
    except (AttributeError, TypeError, ValueError) as error:
        needs = "blocks of convolution, batch normalisation, max pooling and activation"
        raise UserError(f"{PAGE.name} cannot run this network, only {needs}: {error}") from error
    return {
        "activation": activation,
        "blocks": blocks,
        "fc1": {"shape": list(model.fc1.weight.shape)},
        "fc2": {"shape": list(model.fc2.weight.shape)},
        "digit": digit,
        "logits": [round(logit, 3) for logit in model(image)[0].tolist()],
        "weights": base64.b64encode(weights.numpy().astype("<f4").tobytes()).decode(),
    }
