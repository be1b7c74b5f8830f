"""A training on the CPU and on a GPU: all of it works there, and goes from one to the other."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CPU
from test_training import run_here

import train
import utils
import visualize_errors
from extras import several

# No dropout: its random numbers are those of the device. Small rates: roundings do not grow.
PLAIN = ("--epochs", 2, "--dropout-until", 0, "--lr", 0.01, "--peak-lr", 0.02)


def assert_close(a: Path, b: Path):
    """The same weights and metrics but for roundings."""
    first, second = (utils.load_checkpoint(path) for path in (a, b))
    assert first["metrics"] == pytest.approx(second["metrics"], abs=0.03)  # a digit of 50
    for name, tensor in first["model"].items():
        torch.testing.assert_close(tensor, second["model"][name], atol=1e-3, rtol=1e-3, msg=name)


def test_resumes_on_the_same_device_and_on_another(device, call, tiny, tmp_path, monkeypatch):
    def stop(entry: dict) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which has ten bits
    call("train.py", *PLAIN, "--data-dir", tiny, "--out", tmp_path / "cpu")
    call("train.py", *PLAIN, "--device", device, "--data-dir", tiny, "--out", tmp_path / "whole")
    assert_close(tmp_path / "cpu" / "model.pt", tmp_path / "whole" / "model.pt")
    for first, second in {(device, device), (CPU, device), (device, CPU)}:
        out = tmp_path / f"{first}-{second}"
        with monkeypatch.context() as patch:
            patch.setattr(train, "print_epoch", stop)
            flags = ("--data-dir", tiny, "--out", out)
            call("train.py", *PLAIN, "--device", first, *flags, status=130)
        call("train.py", "--resume", "--device", second, *flags)
        assert_close(tmp_path / "whole" / "model.pt", out / "model.pt")


USES = [("--variants", "--val-size", 100), ("--teacher", "TRAINED"), ("--runs", 2)]


@pytest.mark.parametrize("flags", USES)
def test_learns_and_is_measured_and_drawn(
    flags, device, call, trained, tiny, tmp_path, monkeypatch
):
    if device == CPU:
        monkeypatch.setattr(several, "run_side_by_side", run_here)
    monkeypatch.setattr(visualize_errors, "EXPLAINED", 1)
    flags = [trained if word == "TRAINED" else word for word in flags]
    common = ("--device", device, "--data-dir", tiny)
    call("train.py", "--epochs", 2, *flags, *common, "--out", tmp_path)
    path = next(tmp_path.rglob("model.pt"))
    metrics = utils.load_checkpoint(path)["metrics"]
    assert metrics["test_accuracy"] > 0.4
    for tta, name in (((), "test"), (("--tta",), "test_tta")):
        flags = ("--checkpoint", path, *tta, *common, "--json", "-")
        report = json.loads(call("test_model.py", *flags)[0])
        assert report["loss"] == pytest.approx(metrics[f"{name}_loss"], rel=1e-4)
        assert report["accuracy"] == pytest.approx(metrics[f"{name}_accuracy"])
    if metrics.keys() >= {"val_accuracy"}:
        plots = tmp_path / "plots"
        call("visualize_errors.py", "--checkpoint", path, "--tta", *common, "--out", plots)
        assert len(list(plots.glob("*.png"))) == 6
