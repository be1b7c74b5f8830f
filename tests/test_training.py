"""train.py: optimiser, schedule and average by hand; that every flag reaches the training; logs; several runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import CPU, RELEASED

import train
import utils
from model import Net, count_parameters
from train import Recipe

# --- the mathematics, by hand ----------------------------------------------------------------------------------------


def test_schedule_is_one_cycle() -> None:
    """From lr along half a cosine to the peak at 200 of 1,000 steps, along another to 0 behind the last."""

    def rates(steps: int, warmup: float) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        schedule, found = utils.make_schedule(optimizer, 0.015, 0.1, warmup, steps), []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0 if warmup < 1 else 0.1)
        return found

    for step, rate in enumerate(rates(1000, 0.2)):
        if step < 200:
            expected = 0.1 + (0.015 - 0.1) * (1 + math.cos(math.pi * step / 200)) / 2
        else:
            expected = 0.1 * (1 + math.cos(math.pi * (step - 200) / 800)) / 2
        assert rate == pytest.approx(expected, abs=1e-9)
    assert 0.09 < rates(10, 0.0)[0] < 0.1 and 0.09 < rates(10, 1.0)[-1] < 0.1
    for steps in range(1, 30):  # of so short runs a warm-up may be a whole step, or less
        assert all(0 < rate <= 0.1 + 1e-9 for warmup in (0.0, 0.1, 0.2, 1.0) for rate in rates(steps, warmup))


def test_optimizer_is_nesterov_sgd() -> None:
    parameter = nn.Linear(1, 1, bias=False)
    parameter.weight.data.fill_(2.0)
    optimizer = utils.make_optimizer(parameter, lr=0.1, momentum=0.9, weight_decay=0.01)
    w, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0, 0.5):
        parameter.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        g = gradient + 0.01 * w
        velocity = 0.9 * velocity + g
        w -= 0.1 * (g + 0.9 * velocity)
        assert parameter.weight.item() == pytest.approx(w, rel=1e-5)


def test_weight_average() -> None:
    model, average, expected = Net(), Net(), 0.0
    for step in range(60):
        model.fc2.bias.data.fill_(float(step))
        train.update_average(average, model, step, length=4)
        weight = 1.0 if step == 0 else max(1 / 4, 1 / (1 + 0.1 * step))
        expected += weight * (step - expected)
    assert average.fc2.bias[0].item() == pytest.approx(expected, rel=1e-4)
    assert 55 < expected < 57  # 4 steps long: about 3 behind


def test_dropout_falls_linearly_to_zero() -> None:
    assert [train.dropout_factor(x, 0.4) for x in (0, 0.1, 0.2, 0.4, 0.9)] == pytest.approx([1, 0.75, 0.5, 0, 0])
    assert [train.dropout_factor(x, 1) for x in (0, 0.99)] == [1, 1]
    assert train.dropout_factor(0, 0) == 0


def test_distillation_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels, images = torch.randn(5, 10, generator=g), torch.arange(5), torch.zeros(5, 1, 28, 28)
    answers = {"a": torch.randn(5, 10, generator=g), "b": torch.randn(5, 10, generator=g)}
    checkpoint = {"recipe": {"val_size": 0, "folds": 0, "fold": 0}}
    monkeypatch.setattr(utils, "load_model", lambda path, _: (lambda images: answers[path.name], checkpoint))
    loss_fn = train.make_loss(Recipe(teacher=("a", "b"), temperature=3.0, distill_weight=0.6), CPU)
    target = torch.stack([(answer / 3).softmax(1) for answer in answers.values()]).mean(0)
    soft = -(target * (logits / 3).log_softmax(1)).sum(1).mean() * 9
    hard = -logits.log_softmax(1)[range(5), labels].mean()
    assert loss_fn(logits, labels, images).item() == pytest.approx((0.4 * hard + 0.6 * soft).item(), rel=1e-5)


def test_statistics_of_the_averaged_network_are_those_of_plain_digits(trained: Path, data_dir: Path) -> None:
    model, checkpoint = utils.load_model(trained / "model.pt", CPU)
    everything = utils.load_mnist(data_dir, train=True, device=CPU)
    split, _ = utils.make_splits(everything, checkpoint["recipe"]["val_size"], 0, 0)
    x = split.images[:: train.PLAIN_EVERY] / 255
    for block in model.blocks:
        outputs = block.conv(x)
        torch.testing.assert_close(block.norm.running_mean, outputs.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(block.norm.running_var, outputs.var((0, 2, 3)), rtol=1e-2, atol=1e-3)
        x = block(x)


def test_buffers_follow_the_network_and_statistics_are_measured(tiny: Path, tmp_path: Path) -> None:
    split = utils.load_mnist(tiny, train=True, device=CPU)
    run = train.build_run(Recipe(), CPU, data_crc=0, loader=utils.Loader(split, 64, utils.Augmentation(), seed=0))
    for model, value in ((run.model, 1.0), (run.average, 0.0)):
        model.register_buffer("own", torch.tensor(value))
    entry = dict.fromkeys(("epoch", "learning_rate", "train_loss", "train_accuracy"), 1)
    train.end_epoch(run, entry, None, tmp_path, None)
    assert run.average.own == 1
    assert not torch.equal(run.average.blocks[0].norm.running_var, run.model.blocks[0].norm.running_var)


# --- every flag of the recipe reaches the training -------------------------------------------------------------------

TEACHER = ("--teacher", "TRAINED")  # the path of `trained`
WIRES = {  # field: (flags, the same with another value of the field)
    "epochs": ((), ("--epochs", 2)),
    "batch_size": ((), ("--batch-size", 32)),
    "lr": ((), ("--lr", 0.1)),
    "peak_lr": ((), ("--peak-lr", 0.1)),
    "warmup": ((), ("--warmup", 0.5)),
    "momentum": ((), ("--momentum", 0.8)),
    "weight_decay": ((), ("--weight-decay", 0)),
    "ema": ((), ("--ema", 1)),
    "dropout": ((), ("--dropout", 0.1, 0.2, 0.3, 0)),
    "fc_dropout": ((), ("--fc-dropout", 0)),
    "dropout_until": ((), ("--dropout-until", 0.4)),
    "rotation": ((), ("--rotation", 0)),
    "scale": ((), ("--scale", 0)),
    "translate": ((), ("--translate", 0)),
    "shear": ((), ("--shear", 0)),
    "elastic": ((), ("--elastic", 0)),
    "variants": ((), ("--variants", 0.5)),
    "width": ((), ("--width", 2)),
    "activation": ((), ("--activation", "relu")),
    "adaptive_pool": ((), ("--adaptive-pool", "avg")),
    "teacher": ((), TEACHER),
    "temperature": (TEACHER, (*TEACHER, "--temperature", 4)),
    "distill_weight": (TEACHER, (*TEACHER, "--distill-weight", 0.2)),
    "val_size": ((), ("--val-size", 200)),
    "folds": (("--folds", 2, "--fold", 1), ("--folds", 3, "--fold", 1)),
    "fold": (("--folds", 2, "--fold", 1), ("--folds", 2, "--fold", 2)),
    "seed": ((), ("--seed", 1)),
}


@pytest.mark.parametrize("name", [f.name for f in fields(Recipe) if f.name != "threads"])
def test_every_flag_changes_what_is_learnt(name: str, call, trained: Path, tiny: Path, tmp_path: Path) -> None:
    def train_with(flags: tuple) -> torch.Tensor:
        flags = [trained / "model.pt" if word == "TRAINED" else word for word in flags]
        call("train.py", "--epochs", 1, *flags, "--data-dir", tiny, "--out", tmp_path)
        model, _ = utils.load_model(tmp_path / "model.pt", CPU)
        return model.fc1.weight

    plain, changed = map(train_with, WIRES[name])
    assert plain.shape != changed.shape or not torch.equal(plain, changed)


def test_threads_are_set(call, tiny: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    call("train.py", "--epochs", 1, "--threads", 2, "--data-dir", tiny, "--out", tmp_path)
    assert torch.get_num_threads() == 2
    call("train.py", "--epochs", 1, "--data-dir", tiny, "--out", tmp_path)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--epochs", 0), "--epochs 0"),
        (("--lr", "nan"), "--lr nan"),
        (("--lr", 0.2), "above --peak-lr"),
        (("--dropout", 0.1, 0.2, 0.3, 0.96), "--dropout 0.1 0.2 0.3 0.96"),
        (("--width", 33), "from 1 to 32"),
        (("--folds", 1), "2 folds"),
        (("--folds", 3, "--fold", 4), "--fold 4"),
        (("--folds", 3, "--val-size", 5), "--val-size"),
        (("--val-size", 4000), "too few of 4,000"),
        (("--folds", 400, "--fold", 1), "too few of 4,000"),
        (("--teacher", "nowhere.pt"), "nowhere.pt"),
    ],
)
def test_what_is_out_of_range_is_one_line(flags: tuple, word: str, refuse, tmp_path: Path) -> None:
    refuse("train.py", *flags, "--out", tmp_path, words=[word])
    assert not any(tmp_path.iterdir())


def test_argparse_refuses_the_rest_and_help_names_every_flag_and_default(call, capsys) -> None:
    for flags in (("--epochs", "x"), ("--activation", "tanh"), ("--dropout", 1), ("--runs", 0), ("--jobs", "two"),
                  ("--runs", 2, "--folds", 2)):  # fmt: skip
        _, err = call("train.py", *flags, status=2)
        assert err.splitlines()[-1].startswith("train.py: error: ")
    printed, _ = call("train.py", "--help")
    printed = " ".join(printed.split())
    for setting in fields(Recipe):
        assert train.flag(setting.name) in printed
        assert f"(default: {train.format_value(setting.default) or 'none'})" in printed


# --- one run ---------------------------------------------------------------------------------------------------------


def test_train_logs_in_the_specifications_format_and_learns(run, trained: Path, tmp_path: Path) -> None:
    done = run("train.py", "--epochs", 3, "--val-size", 400, "--dropout-until", 0, "--out", tmp_path)
    lines = done.stdout.splitlines()
    parameters = count_parameters(Net())
    assert lines[0] == f"Training {parameters:,} parameters on 3,600 images; cpu, 1 thread"
    assert lines[1:3] == ["Epoch 1", "Learning rate: 0.015000"]
    assert re.fullmatch(r"Train Loss: \d\.\d{4} \| Accuracy: \d+\.\d\d%", lines[3])
    assert re.fullmatch(r"Validation Loss: \d\.\d{4} \| Accuracy: \d+\.\d\d%", lines[4])
    final = re.fullmatch(r"Final Test Accuracy: (\d+\.\d\d)%", lines[-1])
    assert float(final[1]) > 92
    assert done.stderr == ""  # the bar is for terminals

    checkpoint = utils.load_checkpoint(tmp_path / "model.pt")
    history = checkpoint["history"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert all(entry["seconds"] > 0 for entry in history) and history[0]["train_loss"] > history[2]["train_loss"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "model.pt"]

    assert f"{checkpoint['metrics']['test_accuracy']:.2f}" == final[1]
    assert checkpoint["recipe"]["weight_decay"] == 1e-4
    assert checkpoint["versions"]["torch"] == torch.__version__
    assert (tmp_path / "model.pt").stat().st_size < 100_000
    assert_same_bits(trained / "model.pt", tmp_path / "model.pt")  # which the same command wrote


def assert_same_bits(a: Path, b: Path) -> None:
    """The same weights and metrics, and but for the seconds the same history."""
    first, second = utils.load_checkpoint(a), utils.load_checkpoint(b)
    histories = [[{**entry, "seconds": 0} for entry in checkpoint["history"]] for checkpoint in (first, second)]
    assert first["metrics"] == second["metrics"] and histories[0] == histories[1]
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name


def test_resume_keeps_the_recipe(call, refuse, trained: Path, tmp_path: Path) -> None:
    """And of a finished run it says so, and measures again."""
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "model.pt").unlink()
    for flags in (("--epochs", 4), ("--dropout", 0, 0, 0, 0), ("--teacher", RELEASED), ("--seed", 1)):
        refuse("train.py", "--resume", *flags, "--out", tmp_path / "out", words=[flags[0], "--resume keeps that"])
    out, _ = call("train.py", "--resume", "--epochs", 3, "--val-size", 400, "--out", tmp_path / "out")
    assert f"{tmp_path / 'out'} is finished" in out and "Final Test Accuracy" in out
    assert_same_bits(trained / "model.pt", tmp_path / "out" / "model.pt")
    call("train.py", "--resume", "--epochs", 1, "--out", tmp_path / "new")  # nothing there yet: a start


def test_dry_run_keeps_nothing(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, word in ((("--val-size", 100), "Final Test Accuracy"), (("--runs", 2), "mean prediction")):
        out, _ = call("train.py", "--dry-run", *flags)
        assert word in out and "accuracy means nothing" in out.splitlines()[-1] and not any(tmp_path.iterdir())


def test_what_is_going_to_be_replaced_is_said(call, trained: Path, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "out")
    flags = ("--epochs", 1, "--data-dir", tiny, "--out", tmp_path / "out")
    accuracy = utils.load_checkpoint(trained / "model.pt")["metrics"]["test_accuracy"]
    line = call("train.py", *flags)[0].splitlines()[0]
    assert line.endswith(f"replaces {tmp_path / 'out' / 'model.pt'} (seed 0, 3 epochs, {accuracy:.2f}%)")
    (tmp_path / "out" / "model.pt").write_text("no checkpoint")
    assert "no checkpoint of this train.py" in call("train.py", *flags)[0].splitlines()[0]


def test_infinite_loss_stops_and_keeps_the_checkpoint(refuse, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    refuse("train.py", "--lr", 1e5, "--peak-lr", 1e5, "--out", tmp_path / "out", words=["loss", "--peak-lr"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_run_does_not_overwrite_its_teacher(refuse, trained: Path) -> None:
    before = (trained / "model.pt").read_bytes()
    refuse("train.py", "--teacher", trained / "model.pt", "--out", trained, words=["--teacher", trained])
    assert (trained / "model.pt").read_bytes() == before


@pytest.mark.parametrize(
    "held_out, warned",
    [({"val_size": 100}, True), ({"val_size": 400}, False), ({}, False), ({"folds": 3, "fold": 1}, True)],
)
def test_a_teacher_that_has_seen_held_out_images(held_out: dict, warned: bool, trained: Path, capsys) -> None:
    """`trained` has held out 400: to hold out the same 400 is sound, others not."""
    train.make_loss(Recipe(teacher=(str(trained / "model.pt"),), **held_out), CPU)
    assert ("held out here" in capsys.readouterr().err) == warned


def test_a_folder_of_runs_is_as_many_teachers(call, refuse, trained: Path, tiny: Path, tmp_path, monkeypatch) -> None:
    for seed in (0, 1):
        shutil.copytree(trained, tmp_path / "runs" / f"seed-{seed}")
    monkeypatch.chdir(tmp_path)
    call("train.py", "--epochs", 1, "--teacher", "runs", "--data-dir", tiny, "--out", "student")
    expected = tuple(str(tmp_path / "runs" / f"seed-{seed}" / "model.pt") for seed in (0, 1))
    assert utils.load_checkpoint(tmp_path / "student" / "model.pt")["recipe"]["teacher"] == expected
    monkeypatch.chdir(tmp_path / "runs")  # --resume finds them from anywhere
    call("train.py", "--resume", "--data-dir", tiny, "--out", "../student")
    (tmp_path / "empty").mkdir()
    refuse("train.py", "--teacher", tmp_path / "empty", "--out", tmp_path / "out", words=["no model.pt", "empty"])


def test_variants_are_on_by_themselves_only_for_mnists_own_images(call, tiny: Path, tmp_path: Path) -> None:
    call("train.py", "--epochs", 1, "--data-dir", tiny, "--out", tmp_path)
    assert utils.load_checkpoint(tmp_path / "model.pt")["recipe"]["variants"] == 0


# --- several runs ----------------------------------------------------------------------------------------------------


def test_runs_are_those_of_single_commands_and_are_reported(call, tiny: Path, tmp_path: Path) -> None:
    several = ("--runs", 2, "--seed", 3, "--epochs", 1, "--val-size", 100, "--data-dir", tiny)
    printed, _ = call("train.py", *several, "--out", tmp_path / "two")
    call("train.py", "--seed", 4, "--epochs", 1, "--val-size", 100, "--data-dir", tiny, "--out", tmp_path / "one")
    assert_same_bits(tmp_path / "one" / "model.pt", tmp_path / "two" / "seed-4" / "model.pt")
    assert "Epoch 1" in (tmp_path / "two" / "seed-4" / "log.txt").read_text()

    report = json.loads((tmp_path / "two" / "runs.json").read_text())
    values = [run["test_accuracy"] for run in report["runs"]]
    summary, mean = report["test_accuracy"], sum(values) / 2
    std = math.sqrt(sum((value - mean) ** 2 for value in values))
    assert summary == pytest.approx({"mean": mean, "std": std, "sem": std / math.sqrt(2), "min": min(values),
                                     "max": max(values), "n": 2})  # fmt: skip
    assert f"Test Accuracy: mean {mean:.3f}%  std {std:.3f}" in printed
    assert f"{report['ensemble_test_accuracy']:.2f}%" in printed.splitlines()[-1]


def test_folds_fail_by_name_and_resume_with_the_rest(call, tiny: Path, tmp_path: Path) -> None:
    folds = ("--folds", 2, "--jobs", 1, "--epochs", 1, "--data-dir", tiny, "--out", tmp_path)
    (tmp_path / "fold-1" / "model.pt").mkdir(parents=True)  # where a file is to be written
    _, err = call("train.py", *folds, "--resume", status=2)
    assert err.splitlines()[-1].startswith("train.py: error: fold-1 failed")
    assert (tmp_path / "fold-2" / "model.pt").exists() and not (tmp_path / "runs.json").exists()
    (tmp_path / "fold-1" / "model.pt").rmdir()
    call("train.py", *folds, "--resume")
    assert "fold-2 is finished" in (tmp_path / "fold-2" / "log.txt").read_text()
    report = json.loads((tmp_path / "runs.json").read_text())
    assert report["val_accuracy"]["n"] == 2 and "test_accuracy" not in report["runs"][0]


def test_forgotten_flags_of_several_runs_are_refused_before_training(call, refuse, tiny: Path, tmp_path: Path) -> None:
    flags = ("--peak-lr", 0.1, "--epochs", 1, "--data-dir", tiny)
    call("train.py", *flags, "--out", tmp_path / "seed-0")
    several = ("--runs", 2, "--resume", "--data-dir", tiny, "--out", tmp_path)
    refuse("train.py", *several, words=[tmp_path / "seed-0", "made with --epochs 1 --peak-lr 0.1"])
    refuse("train.py", *several, "--epochs", 1, words=["made with --peak-lr 0.1;"])
    refuse("train.py", "--resume", "--out", tmp_path, words=[tmp_path, "several runs", "--runs"])
    assert not (tmp_path / "seed-1").exists() and not (tmp_path / "last.pt").exists()
    call("train.py", *several, *flags)
    assert (tmp_path / "runs.json").exists()


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_missing(refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = ("--epochs", 1, "--tensorboard", tmp_path / "runs", "--out", tmp_path / "out")
    refuse("train.py", *flags, words=["pip install tensorboard"])
    assert not (tmp_path / "out" / "last.pt").exists()  # said before training, not after


def test_tensorboard_has_curves_images_and_hyperparameters(call, tiny: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board, out = tmp_path / "runs", tmp_path / "out"
    flags = ("--val-size", 100, "--tensorboard", board, "--data-dir", tiny, "--out", out)
    call("train.py", "--epochs", 3, *flags)
    call("train.py", "--epochs", 2, *flags)  # a new training into the same folder: new curves
    events = accumulator.EventAccumulator(str(board / "out"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss/train", "loss/val", "accuracy/train", "accuracy/val", "learning_rate"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2]
    assert {"augmented digits", "misclassified digits"} <= set(tags["images"])
    metrics = utils.load_checkpoint(out / "model.pt")["metrics"]
    assert events.Scalars("final/test_accuracy")[0].value == pytest.approx(metrics["test_accuracy"])
