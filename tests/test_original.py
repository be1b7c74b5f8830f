"""The specification's network, the released weights and README's figures, all that is of the unedited network alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Callable

import pytest
import torch
import torch.nn as nn
from conftest import CPU, RELEASED, ROOT, mnist
from PIL import Image, ImageDraw, ImageOps
from test_images import MNIST, photo, scan
from torchvision.transforms import ToTensor

import model as network
import test_model
import utils
from model import ADAPTIVE_POOLS, Net, count_parameters, layer_table, load_pretrained
from test_model import find_images, read_number

BLOCKS = "Block Conv2d BatchNorm2d MaxPool2d SiLU Dropout " * 2 + "Block Conv2d BatchNorm2d Identity SiLU Dropout " * 2
LAYERS = f"Net Sequential {BLOCKS}AdaptiveMaxPool2d Linear SiLU Dropout Linear"
if count_parameters(Net()) != 16_966 or [type(module).__name__ for module in Net().modules()] != LAYERS.split():
    pytest.skip("model.py holds another network than the specification's", allow_module_level=True)

SPECIFIED = [  # name, output size (C, H, W), parameters: the specification's; RF and jump out: computed by hand
    ("Input", (1, 28, 28), (), 1, 1),
    ("Conv1", (12, 28, 28), (108, 12), 3, 1),
    ("BatchNorm1", (12, 28, 28), (24,), 3, 1),
    ("MaxPool1", (12, 14, 14), (), 4, 2),
    ("Conv2", (24, 14, 14), (2592, 24), 8, 2),
    ("BatchNorm2", (24, 14, 14), (48,), 8, 2),
    ("MaxPool2", (24, 7, 7), (), 10, 4),
    ("Conv3", (24, 7, 7), (5184, 24), 18, 4),
    ("BatchNorm3", (24, 7, 7), (48,), 18, 4),
    ("Conv4", (12, 7, 7), (288, 12), 18, 4),
    ("BatchNorm4", (12, 7, 7), (24,), 18, 4),
    ("AdaptivePool", (12, 3, 3), (), 26, 8),
    ("FC1", (72,), (7776, 72), None, None),
    ("FC2", (10,), (720, 10), None, None),
]


@pytest.mark.parametrize("adaptive_pool", ADAPTIVE_POOLS)
def test_layer_table_is_the_specifications(adaptive_pool: str) -> None:
    model = Net(adaptive_pool=adaptive_pool)
    rows = layer_table(model)
    assert [(r.name, r.output_size, r.parameters, r.rf, r.jump_out) for r in rows] == SPECIFIED
    assert count_parameters(model) == sum(sum(r.parameters) for r in rows) == 16_966
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_readme_shows_what_the_command_prints(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["model.py"])
    network.main()
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{12 * 9 * 784 + 24 * 108 * 196 + (24 * 216 + 24 * 12) * 49 + 108 * 72 + 720:,} per image" in printed


def test_receptive_field_is_what_the_gradient_sees() -> None:
    """The central output of block 4 depends on 18 x 18 input pixels and not one more."""
    blocks = Net().eval().blocks
    for block in blocks[:2]:
        block.pool = nn.AvgPool2d(2)  # max pooling's windows, and lets every pixel through
    image = torch.randn(1, 1, 28, 28, requires_grad=True)
    blocks(image)[0, :, 3, 3].sum().backward()
    rows, columns = (image.grad[0, 0] != 0).any(1), (image.grad[0, 0] != 0).any(0)
    for seen in (rows.nonzero(), columns.nonzero()):
        assert int(seen.max() - seen.min()) + 1 == 18


def test_the_released_network_is_readmes() -> None:
    """Within two digits: processors differ in the last bits."""
    model = load_pretrained()
    assert not model.training and count_parameters(model) == 16_966
    test = mnist(train=False)
    errors = int((utils.predict(model, test.images).argmax(1) != test.labels).sum())
    (readme,) = re.findall(r"Test accuracy: .*\((\d+) errors in 10,000\)", (ROOT / "README.md").read_text("utf-8"))
    assert abs(errors - int(readme)) <= 2
    assert RELEASED.stat().st_size < 100_000


def test_to_tensor_images_are_read_in_a_program_of_ones_own() -> None:
    """As README says: what torchvision's ToTensor makes of a picture is the network's input."""
    model, test = load_pretrained(), mnist(train=False)
    images = torch.stack([ToTensor()(Image.fromarray(image)) for image in test.images[:1000, 0].numpy()])
    assert (model(images).argmax(1) == test.labels[:1000]).sum() > 985


def test_scripts_work_from_any_folder_on_the_repositorys_own_data(run, tmp_path: Path) -> None:
    env = {"MNIST_DATA_DIR": ""}
    done = run("test_model.py", "--checkpoint", RELEASED, env=env, cwd=tmp_path)
    assert "errors in 10,000" in done.stdout


def test_the_page_has_the_released_weights(tmp_path: Path) -> None:
    test_model.export_page(load_pretrained(), tmp_path / "draw.html")
    assert (tmp_path / "draw.html").read_bytes() == (ROOT / "assets/draw.html").read_bytes()


def test_scans_are_read(call: Callable, tmp_path: Path) -> None:
    for i in range(80):
        path = tmp_path / str(MNIST.labels[i].item()) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = scan(i, seed=i)
        (image if i % 4 else ImageOps.invert(image)).save(path)
    out, err = call("test_model.py", "--checkpoint", RELEASED, "--images", tmp_path)
    *lines, accuracy = out.splitlines()
    assert [Path(line.split("\t")[0]) for line in lines] == find_images([tmp_path]) and len(lines) == 80
    assert all(0.1 <= float(line.split("\t")[2]) <= 1 for line in lines) and not err
    right = sum(Path(line).parent.name == line.split("\t")[1] for line in lines)
    assert right >= 78 and accuracy == f"Accuracy: {right / 0.8:.2f}% ({right} of 80)"


@pytest.mark.parametrize("kind", ["lined", "shadow", "desk", "island", "number"])
def test_photos_are_read(kind: str, call: Callable, tmp_path: Path) -> None:
    groups = [range(4 * k, 4 * k + 4) for k in range(10)] if kind == "number" else [[k] for k in range(20)]
    for indices in groups:
        path = tmp_path / "".join(str(MNIST.labels[i].item()) for i in indices) / f"{indices[0]}.png"
        path.parent.mkdir(exist_ok=True)
        photo(kind, *indices).save(path)
    out, err = call("test_model.py", "--checkpoint", RELEASED, "--images", tmp_path, "--json", "-")
    results = json.loads(out)
    assert results["accuracy"] >= 0.9 and results["labelled"] == len(groups) and not err
    assert all("".join(str(digit["digit"]) for digit in i["digits"]) == i["number"] for i in results["images"])


def test_a_hairline_is_thickened(tmp_path: Path) -> None:
    image = Image.new("L", (900, 900), 230)
    ImageDraw.Draw(image).line([(300, 200), (600, 190), (400, 700)], 30, 2)
    image.save(tmp_path / "seven.png")
    model, _ = utils.load_model(RELEASED, CPU)
    digit = read_number(tmp_path / "seven.png")[1][0]
    assert test_model.classify(model, digit[None])[0].argmax() == 7 and digit[8:16].amax(1).min() > 150
