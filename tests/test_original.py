"""What is of the unedited network alone: its table, the released weights, README's figures.

With another network of your own: `python -m pytest -m "not original"`.
"""

import re
import sys

import pytest
from conftest import CPU, HANDWRITING, RELEASED, ROOT

import model as network
import utils
from extras import export
from model import count_parameters, load_pretrained

pytestmark = pytest.mark.original


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
