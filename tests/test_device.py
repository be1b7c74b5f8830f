"""A training on the CPU and on a GPU: every part of it works there, and goes over from one to the other."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU

import train
import utils
import visualize_errors
from extras import several
from model import Net
from utils import Split

# No dropout: its random numbers are those of the device. Small rates: roundings do not grow.
PLAIN = ("--epochs", 2, "--dropout", 0, 0, 0, 0, "--fc-dropout", 0, "--lr", 0.01, "--peak-lr", 0.02)


def assert_close(a: Path, b: Path) -> None:
    """The same weights and metrics but for roundings."""
    first, second = (utils.load_checkpoint(path) for path in (a, b))
    assert first["metrics"] == pytest.approx(second["metrics"], abs=0.03)  # a digit of 50
    for name, tensor in first["model"].items():
        torch.testing.assert_close(tensor, second["model"][name], atol=1e-3, rtol=1e-3, msg=name)


def test_resumes_on_the_same_device_and_on_another(device, call, tiny: Path, tmp_path: Path, monkeypatch) -> None:
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
            call("train.py", *PLAIN, "--device", first, "--data-dir", tiny, "--out", out, status=130)
        call("train.py", "--resume", "--device", second, "--data-dir", tiny, "--out", out)
        assert_close(tmp_path / "whole" / "model.pt", out / "model.pt")


@pytest.mark.parametrize("flags", [("--variants", "--val-size", 100), ("--teacher", "TRAINED"), ("--runs", 2)])
def test_learns_and_is_measured_and_drawn(flags, device, call, trained, tiny, tmp_path, monkeypatch) -> None:
    if device == CPU:  # here, to save time
        monkeypatch.setattr(several, "run_side_by_side", lambda commands, *_: [
            folder.name for folder, words in commands.items() if train.main(words[2:])
        ])  # fmt: skip
    monkeypatch.setattr(visualize_errors, "EXPLAINED", 1)
    flags = [trained if word == "TRAINED" else word for word in flags]
    common = ("--device", device, "--data-dir", tiny)
    call("train.py", "--epochs", 2, *flags, *common, "--out", tmp_path)
    path = next(tmp_path.rglob("model.pt"))
    metrics = utils.load_checkpoint(path)["metrics"]
    assert metrics["test_accuracy"] > 0.4
    if "--runs" in flags:
        assert json.loads((tmp_path / "runs.json").read_text())["ensemble_test_tta_accuracy"] > 0.4
    for tta, name in (((), "test"), (("--tta",), "test_tta")):
        report = json.loads(call("test_model.py", "--checkpoint", path, *tta, *common, "--json", "-")[0])
        assert report["loss"] == pytest.approx(metrics[f"{name}_loss"], rel=1e-4)
        assert report["accuracy"] == pytest.approx(metrics[f"{name}_accuracy"])
    if "--variants" in flags:
        call("visualize_errors.py", "--checkpoint", path, "--tta", *common, "--out", tmp_path / "plots")
        assert len(list((tmp_path / "plots").glob("*.png"))) == 6


def test_training_and_reading_mix_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """By fake tensors, which have a device and no contents: a GPU's, also where there is none."""
    fake, cuda = pytest.importorskip("torch._subclasses.fake_tensor"), torch.device("cuda")

    def net(*_: object, **settings: object) -> Net:
        with cuda:
            return Net()

    monkeypatch.setattr(train, "Net", net)  # fake tensors can neither be moved nor copied, nor propagate back
    monkeypatch.setattr(train, "copy", SimpleNamespace(deepcopy=net))
    monkeypatch.setattr(utils, "to_device", lambda model, device: model)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 0.5)
    with fake.FakeTensorMode():
        images = torch.zeros(200, 1, 28, 28, dtype=torch.uint8, device=cuda)
        split = Split(images, torch.zeros(200, dtype=torch.long, device=cuda))
        run = train.build_run(train.Recipe(), split, data_crc=0, device=cuda)
        run.loader.replacements = images, torch.zeros(200, device=cuda)
        for epoch in (0, 1):
            train.train_epoch(run, epoch)
        assert utils.predict.__wrapped__(run.average, images).device == run.loader.losses.device
    utils.grid_basis.cache_clear()  # it holds a fake one
