"""What needs optional packages, with them and without: TensorBoard, ONNX; and the released network in two lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import assert_refused

import utils
from model import count_parameters, load_pretrained


@pytest.fixture
def without(tmp_path: Path):
    """without("onnx"): the environment in which that package cannot be imported."""

    def environment(package: str) -> dict[str, str]:
        folder = tmp_path / "without" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"raise ImportError('not here', name={package!r})")
        return {"PYTHONPATH": str(tmp_path / "without")}

    return environment


def test_tensorboard_missing(run, without, tmp_path: Path) -> None:
    flags = ("--epochs", 1, "--tensorboard", tmp_path / "runs", "--out", tmp_path / "out")
    done = run("train.py", *flags, env=without("tensorboard"), status=2)
    assert "pip install tensorboard" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "last.pt").exists()  # said before training, not after


def test_tensorboard_has_curves_images_and_hyperparameters(run, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board, out = tmp_path / "runs", tmp_path / "out"
    flags = ("--epochs", 2, "--dropout-until", 0.5, "--val-size", 100, "--tensorboard", board, "--out", out)
    run("train.py", *flags)
    events = accumulator.EventAccumulator(str(board / "out"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss/train", "loss/val", "accuracy/train", "accuracy/val", "learning_rate"} <= set(tags["scalars"])
    assert [event.value for event in events.Scalars("dropout_rate/block4")] == pytest.approx([0.4, 0.0])
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2]
    assert "block3.conv.weight" in tags["histograms"]
    assert {"augmented digits", "misclassified digits"} <= set(tags["images"])
    metrics = utils.load_checkpoint(out / "model.pt")["metrics"]
    assert events.Scalars("final/test_accuracy")[0].value == pytest.approx(metrics["test_accuracy"])


def test_onnx_missing(run, without, trained: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", trained / "model.pt", "--export", tmp_path / "m.onnx")
    assert_refused(run("test_model.py", *flags, env=without("onnx"), status=2), "pip install onnx onnxscript")
    assert not (tmp_path / "m.onnx").exists()


def test_onnx_gives_the_same_logits(run, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "m.onnx"
    done = run("test_model.py", "--checkpoint", trained / "model.pt", "--export", path)
    assert str(path) in done.stdout and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model, _ = utils.load_model(trained / "model.pt", torch.device("cpu"))
    for batch in (1, 7):
        x = torch.randn(batch, 1, 28, 28)
        (logits,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_load_pretrained_is_the_released_network(released: Path) -> None:
    model = load_pretrained()
    assert not model.training and count_parameters(model) == 16_966
    assert released.stat().st_size < 100_000
    metrics = utils.load_checkpoint(released)["metrics"]
    assert metrics["test_accuracy"] > 99.42 and utils.load_checkpoint(released)["seed"] == 0
