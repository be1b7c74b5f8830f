"""What is of the unedited network alone: its table, the released weights, README's figures.

With another network of your own: `python -m pytest -m "not original"`.
"""

import re
import sys
from functools import partial

import pytest
from conftest import CPU, HANDWRITING, RELEASED, ROOT
from PIL import ImageOps
from test_photos import MNIST, photo, scan

import model as network
import utils
from extras import export
from model import Net, count_parameters, layer_table, load_pretrained

pytestmark = pytest.mark.original

# Name, output size (C, H, W) and parameters are the specification's; receptive field and jump out
# are computed by hand.
SPECIFIED = [
    ("Input", (1, 28, 28), (), 1, 1),
    ("Conv1", (12, 28, 28), (108, 12), 3, 1), ("BatchNorm1", (12, 28, 28), (24,), 3, 1),
    ("MaxPool1", (12, 14, 14), (), 4, 2),
    ("Conv2", (24, 14, 14), (2592, 24), 8, 2), ("BatchNorm2", (24, 14, 14), (48,), 8, 2),
    ("MaxPool2", (24, 7, 7), (), 10, 4),
    ("Conv3", (24, 7, 7), (5184, 24), 18, 4), ("BatchNorm3", (24, 7, 7), (48,), 18, 4),
    ("Conv4", (12, 7, 7), (288, 12), 18, 4), ("BatchNorm4", (12, 7, 7), (24,), 18, 4),
    ("AdaptivePool", (12, 3, 3), (), 26, 8), ("FC1", (72,), (7776, 72), None, None),
    ("FC2", (10,), (720, 10), None, None),
]


def test_layer_table_is_the_specifications():
    model = Net()
    rows = layer_table(model)
    found = [(r.name, r.output_size, r.parameters, r.receptive_field, r.jump_out) for r in rows]
    assert found == SPECIFIED
    assert count_parameters(model) == sum(sum(r.parameters) for r in rows) == 16_966


def test_readme_shows_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.py"])
    network.main()
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert printed.splitlines()[-1] == "Parameters: 16,966"


def test_the_released_network_is_readmes(run, tmp_path):
    """From any folder, within two digits, of which processors differ in the last bits."""
    model = load_pretrained()
    assert not model.training and count_parameters(model) == 16_966
    done = run("test_model.py", "--checkpoint", RELEASED, cwd=tmp_path, MNIST_DATA_DIR="")
    (errors,) = re.findall(r"\((\d+) errors in 10,000\)", done.stdout)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (readme,) = re.findall(r"Test accuracy: .*\((\d+) errors in 10,000\)", text)
    assert abs(int(errors) - int(readme)) <= 2
    assert RELEASED.stat().st_size < 100_000


def test_the_page_has_the_released_weights(tmp_path):
    model, checkpoint = utils.load_model(HANDWRITING, CPU)
    export.export_page(model, tmp_path / "draw.html", checkpoint)
    assert (tmp_path / "draw.html").read_bytes() == (ROOT / "assets/draw.html").read_bytes()


KINDS = {
    "scan": (60, lambda i: scan(i, seed=i) if i % 4 else ImageOps.invert(scan(i, seed=i))),
    **{kind: (20, partial(photo, kind)) for kind in ("lined", "shadow", "desk", "island")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_read(kind, call, tmp_path):
    count, picture = KINDS[kind]
    for i in range(count):
        path = tmp_path / str(MNIST.labels[i].item()) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture(i).save(path)
    flags = ("--checkpoint", HANDWRITING, "--images", tmp_path, "--labels")
    *lines, accuracy = call("test_model.py", *flags)[0].splitlines()
    right = sum(path.split("/")[-2] == number for path, number, *_ in map(str.split, lines))
    assert accuracy == f"Accuracy: {right / count:.2%} ({right} of {count})"
    assert right >= (0.97 if kind == "scan" else 0.9) * count
