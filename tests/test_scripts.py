"""test_model.py's report and exports, the released network, and one epoch on the whole of MNIST."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, RELEASED, ROOT, mnist

import utils
from model import count_parameters, load_pretrained


def test_report_agrees_with_itself_and_with_training(run, trained: Path, tmp_path: Path) -> None:
    done = run("test_model.py", "--checkpoint", trained / "model.pt", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    confusion = torch.tensor(report["confusion_matrix"])
    assert confusion.sum() == report["count"] == 1000
    assert report["errors"] == 1000 - int(confusion.trace()) == sum(row["errors"] for row in report["digits"])
    assert report["test_accuracy"] == pytest.approx(100 * (1 - report["errors"] / 1000))
    assert report["test_accuracy"] == utils.load_checkpoint(trained / "model.pt")["metrics"]["test_accuracy"]
    three = report["digits"][3]
    assert three["recall"] == pytest.approx(int(confusion[3, 3]) / int(confusion[3].sum()))
    assert three["precision"] == pytest.approx(int(confusion[3, 3]) / int(confusion[:, 3].sum()))
    assert report["parameters"] == 16_966
    assert f"{report['test_accuracy']:.2f}%  ({report['errors']} errors in 1,000)" in done.stdout


def test_json_to_stdout_is_only_json(call, trained: Path) -> None:
    out, _ = call("test_model.py", "--checkpoint", trained / "model.pt", "--json", "-")
    assert json.loads(out)["count"] == 1000


def test_scripts_work_from_any_folder_on_the_repositorys_own_data(run, tmp_path: Path) -> None:
    env = {"MNIST_DATA_DIR": ""}
    done = run("test_model.py", "--checkpoint", RELEASED, env=env, cwd=tmp_path)
    assert "errors in 10,000" in done.stdout


def test_one_epoch_on_the_whole_of_mnist(call, tmp_path: Path) -> None:
    out, _ = call("train.py", "--epochs", 1, "--data-dir", ROOT / "data", "--out", tmp_path)
    assert float(re.search(r"Final Test Accuracy: (\S+)%", out)[1]) > 98


def test_the_released_network_is_readmes() -> None:
    """Within two digits: processors differ in the last bits."""
    model = load_pretrained()
    assert not model.training and count_parameters(model) == 16_966
    test = mnist(train=False)
    errors = int((utils.predict(model, test).argmax(1) != test.labels).sum())
    (readme,) = re.findall(r"Test accuracy: .*\((\d+) errors in 10,000\)", (ROOT / "README.md").read_text("utf-8"))
    assert abs(errors - int(readme)) <= 2
    assert RELEASED.stat().st_size < 100_000


# --- ONNX ------------------------------------------------------------------------------------------------------------


def test_onnx_missing(refuse, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    flags = ("--checkpoint", trained / "model.pt", "--export", tmp_path / "m.onnx")
    refuse("test_model.py", *flags, words=["pip install onnx onnxscript"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_onnx_gives_the_same_logits(pool: str, call, trained: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    checkpoint = utils.load_checkpoint(trained / "model.pt")
    checkpoint["architecture"]["adaptive_pool"] = pool
    torch.save(checkpoint, tmp_path / "model.pt")
    path = tmp_path / "m.onnx"
    out, _ = call("test_model.py", "--checkpoint", tmp_path / "model.pt", "--export", path)
    assert f"Wrote {path}: checked with onnxruntime" in out
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model, _ = utils.load_model(tmp_path / "model.pt", CPU)
    for batch in (1, 7):
        x = torch.randn(batch, 1, 28, 28)
        (logits,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), atol=1e-4, rtol=1e-4)
