"""train.py and test_model.py through their command lines, and what bad input gets."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_refused

import utils
from model import Net
from utils import MNIST_FILES

QUICK = ("--epochs", 2, "--dropout-until", 0.5)  # both with and without dropout


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return utils.load_checkpoint(path)["model"]


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# --- train.py --------------------------------------------------------------------------------------------------------


def test_train_logs_in_the_seeds_format_and_learns(run, tmp_path: Path) -> None:
    done = run("train.py", "--epochs", 3, "--val-size", 200, "--warmup", 0.3, "--dropout-until", 0, "--out", tmp_path)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["Epoch 1", "Learning rate: 0.015000"]
    assert re.fullmatch(r"Train Loss: \d\.\d{4} \| Accuracy: \d+\.\d\d%", lines[2])
    assert re.fullmatch(r"Validation Loss: \d\.\d{4} \| Accuracy: \d+\.\d\d%", lines[3])
    final = re.fullmatch(r"Final Test Accuracy: (\d+\.\d\d)%", lines[-1])
    assert float(final[1]) > 90
    assert "Epoch 1/3" not in done.stderr  # the bar is for terminals

    history = json.loads((tmp_path / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert all(entry["seconds"] > 0 and entry["val_accuracy"] > 0 for entry in history)
    assert history[0]["train_loss"] > history[2]["train_loss"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.json", "last.pt", "model.pt"]

    checkpoint = utils.load_checkpoint(tmp_path / "model.pt")
    assert f"{checkpoint['metrics']['test_accuracy']:.2f}" == final[1]
    assert checkpoint["epoch"] == 3 and checkpoint["seed"] == 0 and checkpoint["recipe"]["weight_decay"] == 1e-4
    assert checkpoint["versions"]["torch"] == torch.__version__
    assert (tmp_path / "model.pt").stat().st_size < 100_000


def test_defaults_are_the_seeds() -> None:
    import train

    recipe = train.parse_args([]).recipe
    expected = {"epochs": 20, "batch_size": 64, "lr": 0.015, "momentum": 0.9, "weight_decay": 1e-4, "scale": 0.1}
    assert {name: recipe[name] for name in expected} == expected
    assert recipe["dropout"] == [0.1, 0.2, 0.3, 0.4] and recipe["rotation"] <= 10 and recipe["val_size"] == 0


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_resume_without_a_checkpoint_starts_and_refuses_another_recipe(run, tmp_path: Path) -> None:
    done = run("train.py", "--resume", "--epochs", 1, "--out", tmp_path)
    assert "starting with epoch 1" in done.stdout
    refused = run("train.py", "--resume", "--lr", 0.5, "--out", tmp_path, status=2)
    assert "--lr 0.5" in refused.stderr and "0.015" in refused.stderr


def test_resume_keeps_flags_of_every_kind(run, tmp_path: Path) -> None:
    flags = ("--epochs", 1, "--ema", 40, "--dropout", 0, 0.1, 0, 0.1, "--translate", 0, "--activation", "relu",
             "--weight-decay", 1e-5, "--seed", 4)  # fmt: skip
    run("train.py", *flags, "--out", tmp_path)
    kept = (tmp_path / "history.json").read_bytes()
    (tmp_path / "history.json").unlink()  # a kill between last.pt and history.json
    done = run("train.py", "--resume", "--out", tmp_path)
    assert "Resuming" in done.stdout
    assert (tmp_path / "history.json").read_bytes() == kept


def test_resume_does_not_take_another_modes_recipe(run, tmp_path: Path) -> None:
    run("train.py", "--epochs", 1, "--runs", 2, "--batch-size", 200, "--out", tmp_path)
    done = run("train.py", "--epochs", 1, "--resume", "--out", tmp_path)
    assert "starting with epoch 1" in done.stdout
    assert utils.load_checkpoint(tmp_path / "model.pt")["recipe"]["batch_size"] == 64


def test_ema_of_length_one_is_the_last_step(run, tmp_path: Path) -> None:
    run("train.py", "--epochs", 1, "--ema", 1, "--batch-size", 150, "--out", tmp_path)  # 14 steps, not a multiple of 8
    checkpoint = utils.load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(checkpoint["model"]["fc2.weight"], checkpoint["training"]["weights"]["fc2.weight"])


def test_interrupt_says_how_to_resume(start, tmp_path: Path) -> None:
    process = start("--epochs", 1000, "--out", tmp_path)
    wait_for(tmp_path / "last.pt", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "--resume" in errors and str(tmp_path) in errors
    assert not list(tmp_path.glob(".*"))


def test_interrupt_in_the_first_epoch_leaves_the_older_run(start, trained: Path, tmp_path: Path) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    process = start("--batch-size", 2, "--out", out)
    assert "not the official MNIST" in process.stderr.readline()  # from here on the interrupt is answered
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "nothing was written" in errors and "--resume" not in errors
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_dry_run_keeps_nothing(run, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"precious")
    done = run("train.py", "--dry-run", "--val-size", 100, "--out", tmp_path)
    assert "Validation Loss" in done.stdout and "Final Test Accuracy" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == b"precious"


def test_infinite_loss_stops_and_keeps_the_checkpoint(run, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "out")
    before = (tmp_path / "out" / "last.pt").read_bytes()
    done = run("train.py", "--epochs", 1, "--peak-lr", 1e29, "--lr", 1e29, "--out", tmp_path / "out", status=2)
    assert_refused_with_warning(done, "the loss is", "at step", "of epoch 1", "--peak-lr")
    assert (tmp_path / "out" / "last.pt").read_bytes() == before


def assert_refused_with_warning(done: subprocess.CompletedProcess, *words: object) -> None:
    """As assert_refused, after the warning that the rendered data is not the official MNIST."""
    lines = [line for line in done.stderr.splitlines() if "not the official MNIST" not in line]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert str(word) in lines[0]


@pytest.mark.parametrize(
    "flags",
    [("--epochs", 0), ("--epochs", "x"), ("--lr", -1), ("--lr", "nan"), ("--lr", "inf"),
     ("--threads", 10**11), ("--momentum", 1), ("--dropout", 0.1, 0.2, 0.3),
     ("--dropout", 0, 0, 0, 1), ("--warmup", 1.5), ("--batch-size", 1), ("--folds", 1), ("--device", "tpu"),
     ("--folds", 3, "--runs", 2), ("--seed", -1), ("--nonsense",)],
)  # fmt: skip
def test_flags_out_of_range_get_argparses_error(flags: tuple, capsys: pytest.CaptureFixture) -> None:
    import train

    with pytest.raises(SystemExit) as exit_:
        train.parse_args([*map(str, flags)])
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert "error:" in errors and str(flags[0]) in errors


def test_help_names_every_flag_and_default(run) -> None:
    import train

    printed = " ".join(run("train.py", "--help").stdout.split())
    for name, value in train.parse_args([]).recipe.items():
        flag = f"--{name.replace('_', '-')} "
        assert flag in printed
        if not isinstance(value, list):
            part = printed[printed.rindex(flag) :]
            assert f"default: {value})" in part[: part.index(")", part.index("default:")) + 1], name
    for flag in ("--resume", "--runs", "--folds", "--dry-run", "--data-dir", "--device"):
        assert flag in printed


def test_val_size_too_large(run, tmp_path: Path) -> None:
    assert_refused_with_warning(run("train.py", "--val-size", 2000, "--out", tmp_path, status=2), "--val-size 2000")


# --- several seeds, folds, teachers ----------------------------------------------------------------------------------


def test_runs_table_and_ensemble(run, tmp_path: Path) -> None:
    flags = ("--epochs", 2, "--runs", 2, "--seed", 3, "--dropout-until", 0)
    done = run("train.py", *flags, "--out", tmp_path)
    report = json.loads((tmp_path / "runs.json").read_text())
    accuracies = [entry["test_accuracy"] for entry in report["runs"]]
    assert [entry["seed"] for entry in report["runs"]] == [3, 4]
    assert report["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert report["test_accuracy"]["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert report["test_accuracy"]["min"] == min(accuracies) and report["test_accuracy"]["n"] == 2
    assert f"mean {report['test_accuracy']['mean']:.3f}%" in done.stdout
    assert f"{report['ensemble_test_accuracy']:.2f}%" in done.stdout.splitlines()[-1]

    run("train.py", "--epochs", 2, "--seed", 4, "--dropout-until", 0, "--out", tmp_path / "alone")
    assert_same_bits(tmp_path / "seed-4" / "model.pt", tmp_path / "alone" / "model.pt")
    first, second = (weights_of(tmp_path / f"seed-{seed}" / "model.pt") for seed in (3, 4))
    assert not torch.equal(first["fc2.weight"], second["fc2.weight"])
    before = (tmp_path / "seed-3" / "last.pt").stat().st_mtime_ns
    run("train.py", "--runs", 2, "--resume", "--out", tmp_path)  # seeds and recipe come from the checkpoints
    assert json.loads((tmp_path / "runs.json").read_text())["runs"] == report["runs"]
    assert (tmp_path / "seed-3" / "last.pt").stat().st_mtime_ns == before  # finished runs are kept


def test_more_seeds_beside_older_ones_are_a_new_start(run, tmp_path: Path) -> None:
    run("train.py", "--epochs", 1, "--dropout-until", 0, "--out", tmp_path / "seed-0")
    flags = ("--runs", 2, "--seed", 5, "--batch-size", 100, "--epochs", 1, "--dropout-until", 0, "--out", tmp_path)
    done = run("train.py", *flags, "--resume")
    assert done.stdout.count("starting with epoch 1") == 2
    assert utils.load_checkpoint(tmp_path / "seed-6" / "model.pt")["recipe"]["batch_size"] == 100


def test_cross_validation_and_its_resume(run, tmp_path: Path) -> None:
    flags = ("--folds", 3, "--epochs", 1, "--dropout-until", 0, "--seed", 7)
    done = run("train.py", *flags, "--out", tmp_path)
    report = json.loads((tmp_path / "cross_validation.json").read_text())
    folds = report["folds"]
    assert sum(fold["val_size"] for fold in folds) == 2000
    assert all(fold["train_size"] + fold["val_size"] == 2000 for fold in folds)
    values = [fold["val_accuracy"] for fold in folds]
    assert report["val_accuracy"]["mean"] == pytest.approx(sum(values) / 3)
    assert "(3 folds)" in done.stdout and "Test" not in done.stdout
    kept = (tmp_path / "fold-1" / "last.pt").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "fold-3")
    (tmp_path / "cross_validation.json").unlink()
    run("train.py", "--folds", 3, "--resume", "--out", tmp_path)
    again = json.loads((tmp_path / "cross_validation.json").read_text())
    assert [fold["val_accuracy"] for fold in again["folds"]] == values
    assert (tmp_path / "fold-1" / "last.pt").stat().st_mtime_ns == kept


def test_distillation_from_two_teachers(run, trained: Path, tmp_path: Path) -> None:
    teachers = (trained / "model.pt", trained / "last.pt")
    done = run("train.py", *QUICK, "--teacher", *teachers, "--temperature", 2, "--out", tmp_path)
    assert "Final Test Accuracy" in done.stdout
    assert utils.load_checkpoint(tmp_path / "model.pt")["recipe"]["teacher"] == [str(t) for t in teachers]


def test_a_run_does_not_overwrite_its_teacher(run, trained: Path) -> None:
    before = (trained / "model.pt").read_bytes()
    done = run("train.py", "--teacher", trained / "model.pt", "--out", trained, status=2)
    assert_refused(done, "--teacher", trained)
    assert (trained / "model.pt").read_bytes() == before


@pytest.mark.parametrize(
    "more, warned",
    [({"val_size": 100}, True), ({"val_size": 200}, False), ({"val_size": 0}, False), ({"folds": 3, "fold": 1}, True)],
)
def test_a_teacher_that_has_seen_held_out_images(more: dict, warned: bool, trained: Path, capsys) -> None:
    """`trained` has held out 200: to hold out the same 200 is sound, others not."""
    import train

    recipe = train.parse_args(["--teacher", str(trained / "model.pt")]).recipe
    train.make_loss({**recipe, **more}, torch.device("cpu"))
    assert ("held out here" in capsys.readouterr().err) == warned


def test_distillation_loss_by_hand() -> None:
    import train

    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 10, generator=g, requires_grad=True), torch.arange(5)
    a, b = torch.randn(5, 10, generator=g), torch.randn(5, 10, generator=g)
    teachers: list[Any] = [lambda images: a, lambda images: b]
    loss = train.distillation_loss(
        logits, labels, torch.zeros(5), teachers=teachers, temperature=3.0, weight=0.6, label_smoothing=0.0
    )
    target = ((a / 3).exp() / (a / 3).exp().sum(1, True) + (b / 3).exp() / (b / 3).exp().sum(1, True)) / 2
    soft = -(target * (logits / 3).log_softmax(1)).sum(1).mean() * 9
    hard = -logits.log_softmax(1)[range(5), labels].mean()
    assert loss.item() == pytest.approx((0.4 * hard + 0.6 * soft).item(), rel=1e-5)


def test_folded_teacher_is_the_same_function(trained: Path) -> None:
    from train import fold_norms

    x = torch.randn(8, 1, 28, 28)
    model, _ = utils.load_model(trained / "model.pt", torch.device("cpu"))
    expected = model(x).detach()
    torch.testing.assert_close(fold_norms(model)(x).detach(), expected, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_a_wide_network_trains_and_is_read_back(run, tmp_path: Path) -> None:
    run("train.py", "--width", 2, "--activation", "relu", "--adaptive-pool", "avg", "--epochs", 1, "--out", tmp_path)
    report = json.loads(run("test_model.py", "--checkpoint", tmp_path / "model.pt", "--json", "-").stdout)
    assert report["parameters"] == sum(p.numel() for p in Net(width=2).parameters())


def test_dropout_factor() -> None:
    from train import dropout_factor

    assert [round(dropout_factor(epoch, 10, 0.5), 6) for epoch in range(7)] == [1, 0.8, 0.6, 0.4, 0.2, 0, 0]
    assert dropout_factor(9, 10, 1.0) == 1.0 and dropout_factor(0, 10, 0.0) == 0.0


# --- test_model.py ---------------------------------------------------------------------------------------------------


def test_report_agrees_with_itself_and_with_training(run, trained: Path, tmp_path: Path) -> None:
    done = run("test_model.py", "--checkpoint", trained / "model.pt", "--json", tmp_path / "r.json", "--tta")
    report = json.loads((tmp_path / "r.json").read_text())
    confusion = torch.tensor(report["confusion_matrix"])
    assert confusion.sum() == report["count"] == 500
    assert report["errors"] == 500 - int(confusion.trace()) == sum(row["errors"] for row in report["digits"])
    assert report["test_accuracy"] == pytest.approx(100 * (1 - report["errors"] / 500))
    assert report["test_accuracy"] == utils.load_checkpoint(trained / "model.pt")["metrics"]["test_accuracy"]
    three = report["digits"][3]
    assert three["recall"] == pytest.approx(int(confusion[3, 3]) / int(confusion[3].sum()))
    assert three["precision"] == pytest.approx(int(confusion[3, 3]) / int(confusion[:, 3].sum()))
    assert report["parameters"] == 16_966
    assert f"{report['test_accuracy']:.2f}%  ({report['errors']} errors in 500)" in done.stdout
    assert f"With test-time augmentation: {report['tta_accuracy']:.2f}%" in done.stdout
    assert report["tta_accuracy"] > 80


def test_json_to_stdout_is_only_json(run, trained: Path) -> None:
    printed = run("test_model.py", "--checkpoint", trained / "model.pt", "--json", "-").stdout
    assert json.loads(printed)["count"] == 500


def test_tta_of_an_invariant_model_changes_nothing() -> None:
    from test_model import predict_tta

    class Ink(torch.nn.Module):  # total ink hardly changes when a small digit is moved or turned
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).sum(1, keepdim=True).expand(-1, 10)

    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 10:18, 12:15] = 200
    images[1, 0, 8:20, 9:18] = 100
    split = utils.Split(images, torch.zeros(2, dtype=torch.long))
    plain, averaged = utils.predict(Ink(), split), predict_tta(Ink(), split)
    torch.testing.assert_close(averaged, plain, rtol=0.02, atol=0)


# --- bad checkpoints -------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled by an unsafe reader, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def edit(source: Path, target: Path, **changes: Any) -> None:
    torch.save({**torch.load(source, weights_only=True), **changes}, target)


def test_bad_checkpoints_are_refused_in_one_line(run, trained: Path, tmp_path: Path) -> None:
    good, bad, trap = trained / "model.pt", tmp_path / "bad.pt", tmp_path / "trap"
    weights = weights_of(good)

    def refused(script: str, *words: object) -> None:
        done = run(script, "--checkpoint", bad, status=2)
        assert_refused(done, bad, *words)
        assert done.stdout == ""

    refused("test_model.py", "python train.py", "--checkpoint assets/mnist_cnn.pt")
    refused("visualize_errors.py", "python train.py", "--checkpoint assets/mnist_cnn.pt")
    bad.write_bytes(good.read_bytes()[:40_000])
    refused("test_model.py", "damaged")
    torch.save({"architecture": Evil(trap), "model": {}}, bad)
    refused("test_model.py", "refused")
    edit(good, bad, architecture={"width": 3, "activation": "silu", "adaptive_pool": "max"})
    refused("test_model.py", "architecture")
    edit(good, bad, model={**weights, "fc2.bias": torch.full((10,), float("nan"))})
    refused("visualize_errors.py", "not finite")
    assert not trap.exists()


@pytest.mark.parametrize("make", ["empty", "text", "directory", "pickle", "list", "no_keys"])
def test_what_is_no_checkpoint_is_refused(make: str, tmp_path: Path) -> None:
    path, trap = tmp_path / "bad.pt", tmp_path / "trap"
    if make == "directory":
        path.mkdir()
    elif make in ("list", "no_keys"):
        torch.save([1, 2] if make == "list" else {"model": {}}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "pickle": pickle.dumps(Evil(trap))}[make])
    with pytest.raises(utils.UserError, match=re.escape(str(path))):
        utils.load_model(path, torch.device("cpu"))
    assert not trap.exists()


def test_a_full_disk_under_the_output_is_one_line(environment, trained: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full_disk:
        done = subprocess.run(
            [sys.executable, "test_model.py", "--checkpoint", trained / "model.pt"], cwd=ROOT, env=environment,
            stdout=full_disk, stderr=subprocess.PIPE, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error(environment, trained: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "test_model.py", "--checkpoint", trained / "model.pt"], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()  # as `| true` does
    assert "Traceback" not in process.stderr.read() and process.wait() == 1


def test_download_replaces_only_what_is_missing(data_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's download, here a fake one, brings all four files."""
    import torchvision.datasets

    raw = data_copy / "MNIST" / "raw"
    kept = {name: (raw / name).read_bytes() for name in MNIST_FILES}

    def fake(root: str, download: bool) -> None:
        (Path(root) / "MNIST" / "raw").mkdir(parents=True)
        for name in MNIST_FILES:
            (Path(root) / "MNIST" / "raw" / name).write_bytes(kept[name] if "t10k" in name else b"official")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fake)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    utils.prepare_mnist(data_copy)
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == kept
    assert [path.name for path in data_copy.iterdir()] == ["MNIST"]


# --- bad data --------------------------------------------------------------------------------------------------------


def test_no_data_no_network(run, tmp_path: Path) -> None:
    blocked = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = run("train.py", "--data-dir", tmp_path, "--out", tmp_path / "o", status=2, env=blocked)
    message = done.stderr.splitlines()[-1]
    for word in (tmp_path / "MNIST" / "raw", *MNIST_FILES, "--data-dir", "MNIST_DATA_DIR"):
        assert str(word) in message
    assert not (tmp_path / "MNIST").exists()


@pytest.fixture
def data_copy(data_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(data_dir / "MNIST", tmp_path / "MNIST")
    return tmp_path


def damage(raw: Path, how: str) -> str:
    """Damage one file; returns its name."""
    images, labels = "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"
    name = labels if how in ("label 10", "labels magic", "fewer labels") else images
    data = bytearray((raw / name).read_bytes())
    if how == "truncated":
        del data[-100:]
    elif how == "header only":
        del data[7:]
    elif how == "too long":
        data += b"x"
    elif how in ("images magic", "labels magic"):
        data[3] ^= 1
    elif how == "huge count":
        data[4] = 0x7F
    elif how == "29 rows":
        data[11] = 29
    elif how == "label 10":
        data[100] = 10
    elif how == "fewer labels":
        data[4:8] = (1999).to_bytes(4, "big")
        del data[-1:]
    (raw / name).write_bytes(data)
    return name


@pytest.mark.parametrize(
    "how", ["truncated", "header only", "too long", "images magic", "labels magic", "huge count", "29 rows", "label 10",
            "fewer labels"],
)  # fmt: skip
def test_broken_data_files_are_refused(data_copy: Path, how: str) -> None:
    name = damage(data_copy / "MNIST" / "raw", how)
    with pytest.raises(utils.UserError) as refused:
        utils.prepare_mnist(data_copy)
    assert "\n" not in str(refused.value)
    assert (name in str(refused.value)) or how == "fewer labels"


def test_broken_data_through_the_scripts(run, trained: Path, data_copy: Path, tmp_path: Path) -> None:
    name = damage(data_copy / "MNIST" / "raw", "truncated")
    flags = ("--data-dir", data_copy)
    assert_refused(run("train.py", *flags, "--out", tmp_path / "o", status=2), name, "truncated", "delete it")
    assert_refused(run("test_model.py", *flags, "--checkpoint", trained / "model.pt", status=2), name, "truncated")


def test_other_content_is_used_with_a_warning(data_copy: Path, capsys: pytest.CaptureFixture) -> None:
    split = utils.load_mnist(data_copy, train=False, device=torch.device("cpu"))
    assert split.images.shape == (500, 1, 28, 28) and split.images.dtype == torch.uint8
    assert "checksum" in capsys.readouterr().err


def test_gzipped_files_are_unpacked_and_damaged_ones_refused(data_copy: Path) -> None:
    raw = data_copy / "MNIST" / "raw"
    expected = {name: (raw / name).read_bytes() for name in MNIST_FILES}
    for name, data in expected.items():
        (raw / name).unlink()
        (raw / f"{name}.gz").write_bytes(gzip.compress(data, 1))
    packed = raw / "train-images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    for bad in (whole[:-2000], b"garbage", gzip.compress(expected["train-images-idx3-ubyte"] + bytes(10**7), 1)):
        packed.write_bytes(bad)
        with pytest.raises(utils.UserError, match="train-images"):
            utils.prepare_mnist(data_copy)
        assert not list(raw.glob(".*")) and not (raw / "train-images-idx3-ubyte").exists()
    packed.write_bytes(whole)
    utils.prepare_mnist(data_copy)
    assert {name: (raw / name).read_bytes() for name in MNIST_FILES} == expected


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.skipif("MNIST_DATA_DIR" not in os.environ, reason="MNIST_DATA_DIR is not set")
def test_one_epoch_on_real_mnist(run, tmp_path: Path) -> None:
    done = run("train.py", "--data-dir", os.environ["MNIST_DATA_DIR"], "--epochs", 1, "--dropout-until", 0,
               "--out", tmp_path, timeout=600)  # fmt: skip
    assert float(re.search(r"Final Test Accuracy: (\d+\.\d\d)%", done.stdout)[1]) > 98
    assert "checksum" not in done.stderr
