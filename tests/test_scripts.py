"""test_model.py's report and exports, the released network, and one epoch on the whole of MNIST."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT

import test_model
import utils
from model import Net, count_parameters


def test_report_agrees_with_itself_and_with_training(run, trained: Path, tmp_path: Path) -> None:
    done = run("test_model.py", "--checkpoint", trained / "model.pt", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    confusion = torch.tensor(report["confusion_matrix"])
    assert confusion.sum() == report["count"] == 1000
    assert report["errors"] == 1000 - int(confusion.trace()) == sum(row["errors"] for row in report["digits"])
    assert report["accuracy"] == pytest.approx(1 - report["errors"] / 1000)
    metrics = utils.load_checkpoint(trained / "model.pt")["metrics"]
    assert 100 * report["accuracy"] == pytest.approx(metrics["test_accuracy"])
    three = report["digits"][3]
    assert three["recall"] == pytest.approx(int(confusion[3, 3]) / int(confusion[3].sum()))
    assert three["precision"] == pytest.approx(int(confusion[3, 3]) / int(confusion[:, 3].sum()))
    assert report["parameters"] == count_parameters(Net())
    assert f"Test accuracy:  {report['accuracy']:.2%}  ({report['errors']} errors in 1,000)" in done.stdout


def test_json_to_stdout_is_only_json(call, trained: Path) -> None:
    out, _ = call("test_model.py", "--checkpoint", trained / "model.pt", "--json", "-")
    assert json.loads(out)["count"] == 1000


def test_the_validation_and_training_images_are_measured_as_well(call, trained: Path) -> None:
    val, _ = call("test_model.py", "--checkpoint", trained / "model.pt", "--split", "val")
    history = utils.load_checkpoint(trained / "model.pt")["history"]
    assert f"Validation accuracy:  {history[-1]['val_accuracy']:.2f}%  (" in val and " in 400)" in val
    train, _ = call("test_model.py", "--checkpoint", trained / "model.pt", "--split", "train", "--json", "-")
    assert json.loads(train)["split"] == "train" and json.loads(train)["count"] == 3600


def test_one_epoch_on_the_whole_of_mnist(call, tmp_path: Path) -> None:
    out, _ = call("train.py", "--epochs", 1, "--data-dir", ROOT / "data", "--out", tmp_path)
    assert float(re.search(r"Final Test Accuracy: (\S+)%", out)[1]) > 98
    assert utils.load_checkpoint(tmp_path / "model.pt")["recipe"]["variants"] > 0  # of MNIST's own images


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


def test_onnx_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)

    class Branching(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.mean() > 0 else -x)

    with pytest.raises(utils.UserError, match=r"^not exported, torch.onnx cannot express this network: [ -~]*$"):
        test_model.export_onnx(Branching().eval(), tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())
