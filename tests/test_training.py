"""train.py: optimiser, schedule and average by hand; that every flag reaches the training; logs; several runs."""

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
from extras import several as runs
from model import Net, count_parameters
from train import Recipe


def rates(steps: int, warmup: float) -> list[float]:
    """The rates of all steps, and the one behind the last, of a cycle from 0.015 to 0.1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule, found = utils.make_schedule(optimizer, 0.015, 0.1, warmup, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_schedule_is_one_cycle() -> None:
    """Along half a cosine to the peak at 200 of 1,000 steps, along another to 0 behind the last."""
    up = [0.1 + (0.015 - 0.1) * (1 + math.cos(math.pi * step / 200)) / 2 for step in range(200)]
    down = [0.1 * (1 + math.cos(math.pi * step / 800)) / 2 for step in range(801)]
    assert rates(1000, 0.2) == pytest.approx(up + down, abs=1e-9)
    with pytest.raises(utils.UserError, match=r"--lr 0\.015 is above --peak-lr 0\.01:"):
        utils.make_schedule(torch.optim.SGD([torch.zeros(1)], 1.0), 0.015, 0.01, 0.2, 1000)
    for steps in range(1, 30):  # of so short runs a warm-up may be a whole step, or less
        assert all(0 < rate <= 0.1 + 1e-9 for warmup in (0.0, 0.1, 0.2, 1.0) for rate in rates(steps, warmup)[:-1])


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
    found = [train.dropout_factor(*args) for args in ((0, 0.4), (0.1, 0.4), (0.4, 0.4), (0.9, 0.4), (0.9, 1), (0, 0))]
    assert found == pytest.approx([1, 0.75, 0, 0, 1, 0])


def test_distillation_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels, images = torch.randn(5, 10, generator=g), torch.arange(5), torch.zeros(5, 1, 28, 28)
    answers = {"a": torch.randn(5, 10, generator=g), "b": torch.randn(5, 10, generator=g)}
    checkpoint = {"recipe": {"val_size": 0, "folds": 0, "fold": 0}}
    monkeypatch.setattr(utils, "load_model", lambda path, _: (lambda images: answers[path.name], checkpoint))
    loss_fn = train.make_loss(Recipe(teacher=("a", "b")), CPU)
    target = torch.stack([answer.softmax(1) for answer in answers.values()]).mean(0)
    soft = -(target * logits.log_softmax(1)).sum(1).mean()
    hard = -logits.log_softmax(1)[range(5), labels].mean()
    assert loss_fn(logits, labels, images).item() == pytest.approx((0.3 * hard + 0.7 * soft).item(), rel=1e-5)


def test_statistics_of_the_averaged_network_are_those_of_plain_digits(trained: Path, data_dir: Path) -> None:
    model, checkpoint = utils.load_model(trained / "model.pt", CPU)
    everything = utils.load_mnist(data_dir, train=True, device=CPU)
    split, _ = utils.make_splits(everything, *(checkpoint["recipe"][name] for name in utils.SPLIT_SETTINGS))
    x = split.images[:: train.STATISTICS_EVERY] / 255
    for block in model.blocks:
        outputs = block.conv(x)
        torch.testing.assert_close(block.norm.running_mean, outputs.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(block.norm.running_var, outputs.var((0, 2, 3)), rtol=1e-2, atol=1e-3)
        x = block(x)


WIRES = {  # field: flags that change it, and what else is built than by the default, all else being the same
    "epochs": ("--epochs 3", {"rates"}), "batch_size": ("--batch-size 32", {"rates", "images"}),
    "lr": ("--lr 0.1", {"rates"}), "peak_lr": ("--peak-lr 0.1", {"rates"}), "warmup": ("--warmup 0.5", {"rates"}),
    "momentum": ("--momentum 0.8", {"optimizer"}), "weight_decay": ("--weight-decay 0", {"optimizer"}),
    "ema_steps": ("--ema-steps 1", set()), "dropout_until": ("--dropout-until 0.6", set()),
    "dropout": ("--dropout 0.1 0.2 0.3 0", {"layers"}), "fc_dropout": ("--fc-dropout 0", {"layers"}),
    **{name: (f"--{name} 0", {"images"}) for name in ("rotation", "scale", "translate", "shear", "elastic")},
    "hard_fraction": ("--hard-fraction 0", {"images"}), "variants": ("--variants", {"images"}),
    "width": ("--width 2", {"layers", "weights"}), "activation": ("--activation relu", {"layers"}),
    "adaptive_pool": ("--adaptive-pool avg", {"layers"}), "teacher": ("--teacher TRAINED", {"loss"}),
    "train_size": ("--train-size 300", {"rates", "images"}), "val_size": ("--val-size 200", {"rates", "images"}),
    "folds": ("--folds 4 --fold 1", {"images"}), "fold": ("--folds 3 --fold 2", {"images"}),
    "seed": ("--seed 1", {"weights", "images"}),
}  # fmt: skip
BEFORE = {"fold": "--folds 3 --fold 1", "folds": "--folds 3 --fold 1"}  # instead of no flags


@pytest.fixture
def build(call, trained: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """build("--lr 1"): the run as train.py has built it before its first step; TRAINED is the folder of `trained`."""

    def build(flags: str) -> train.Run:
        def stop(run: train.Run, epoch: int) -> None:
            built.append(run)
            raise KeyboardInterrupt

        built: list[train.Run] = []
        words = flags.replace("TRAINED", str(trained)).split()
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_epoch", stop)
            call("train.py", *words, "--data-dir", tiny, "--out", tmp_path, status=130)
        return built[0]

    return build


def parts_of(run: train.Run) -> dict[str, object]:
    """What a user can set of a training, and what a few steps of its second epoch make of the network."""
    run.loader.losses, run.loader.epoch = torch.arange(1.0 + len(run.loader.losses))[1:], 1
    logits, labels = torch.linspace(0, 99, 40).sin().view(4, 10), torch.arange(4)
    parts = {
        "layers": str(run.model),
        "weights": run.model.fc1.weight.detach().clone(),
        "optimizer": [run.optimizer.param_groups[0][name] for name in ("momentum", "weight_decay")],
        "images": next(iter(run.loader))[0],
        "loss": run.loss_fn(logits, labels, torch.zeros(4, 1, 28, 28)).item(),
    }
    rates = train.train_epoch(run, 1)["learning_rates"]
    return {**parts, "rates": rates, "trained": run.average.fc1.weight}


@pytest.mark.parametrize("name", [f.name for f in fields(Recipe) if f.name != "threads"])
def test_every_flag_changes_what_it_says_and_what_is_learnt(name: str, build, monkeypatch) -> None:
    monkeypatch.setattr(train, "CHECKS", 10_000)  # so that the rate of each step is kept
    flags, expected = WIRES[name]
    base = "--epochs 2 --dropout-until 1 --batch-size 128 "
    before, after = parts_of(build(base + BEFORE.get(name, ""))), parts_of(build(base + flags))
    same = [torch.equal(before[p], after[p]) if torch.is_tensor(before[p]) else before[p] == after[p] for p in before]
    assert {part for part, equal in zip(before, same) if not equal} == {*expected, "trained"}


OUT_OF_RANGE = {
    "--epochs 0": "--epochs 0", "--lr nan": "--lr nan", "--lr 0.2": "above --peak-lr", "--width 33": "from 1 to 32",
    "--dropout 0.1 0.2 0.3 0.96": "--dropout 0.1 0.2 0.3 0.96", "--hard-fraction 1.1": "from 0 to 1",
    "--folds 1": "2 folds", "--folds 3 --fold 4": "--fold 4", "--folds 3 --val-size 5": "--val-size",
    "--val-size 4000": "too many of 4,000", "--folds 400 --fold 1": "too many of 4,000",
    "--val-size 400 --train-size 3601": "too many of 4,000", "--teacher nowhere.pt": "nowhere.pt",
    "--runs 2 --folds 2": "--folds",
}  # fmt: skip


@pytest.mark.parametrize("flags", OUT_OF_RANGE)
def test_what_is_out_of_range_is_one_line(flags: str, refuse, tmp_path: Path) -> None:
    refuse("train.py", *flags.split(), "--out", tmp_path, words=[OUT_OF_RANGE[flags]])
    assert not any(tmp_path.iterdir())


def test_train_logs_in_the_specifications_format_and_learns(run, trained: Path, tmp_path: Path) -> None:
    done = run("train.py", "--epochs", 3, "--val-size", 400, "--dropout-until", 0, "--out", tmp_path)
    assert done.stderr == ""  # the bar is for terminals
    lines, checkpoint = done.stdout.splitlines(), utils.load_checkpoint(tmp_path / "model.pt")
    history, metrics = checkpoint["history"], checkpoint["metrics"]
    assert lines[0] == f"Training {count_parameters(Net()):,} parameters on 3,600 images; cpu, 1 thread"
    assert lines[1].startswith("Train loss and accuracy are of augmented images")
    assert lines[2:4] == ["Epoch 1", "Learning rate: 0.015000"]
    assert re.fullmatch(r"Train Loss: \d\.\d{4} \| Accuracy: \d+\.\d\d%", lines[4])
    assert re.fullmatch(r"Validation Loss: \d\.\d{4} \| Accuracy: \d+\.\d\d%", lines[5])
    assert lines[-2] == f"Final Test Accuracy: {metrics['test_accuracy']:.2%}" and metrics["test_accuracy"] > 0.92
    assert lines[-1] == f"Trained in 0 min {sum(entry['seconds'] for entry in history):.0f} s"

    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert all(entry["seconds"] > 0 for entry in history) and history[0]["train_loss"] > history[2]["train_loss"]
    rates = [entry["learning_rates"] for entry in history]
    assert [rate[0] for rate in rates] == [entry["learning_rate"] for entry in history]
    assert [rate[0] for rate in rates[1:]] == [rate[-1] for rate in rates[:-1]] and len(rates[0]) == 1 + train.CHECKS
    assert metrics["val_accuracy"] == history[-1]["val_accuracy"]
    assert [*metrics] == [f"{p}_{m}" for p in ("val", "val_tta", "test", "test_tta") for m in ("loss", "accuracy")]
    assert checkpoint["recipe"]["weight_decay"] == 1e-4 and checkpoint["versions"]["torch"] == torch.__version__
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "model.pt"]
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
        refuse("train.py", "--resume", *flags, "--out", tmp_path / "out", words=[flags[0], "cannot change that"])
    out, _ = call("train.py", "--resume", "--epochs", 3, "--val-size", 400, "--out", tmp_path / "out")
    assert f"{tmp_path / 'out'} is finished" in out and "Final Test Accuracy" in out
    assert_same_bits(trained / "model.pt", tmp_path / "out" / "model.pt")
    call("train.py", "--resume", "--epochs", 1, "--out", tmp_path / "new")  # nothing there yet: a start


def test_resume_with_another_optimiser_or_schedule_is_refused(refuse, trained: Path, monkeypatch) -> None:
    before = (trained / "last.pt").read_bytes()
    schedules = torch.optim.lr_scheduler
    for name, other, words in (
        ("make_optimizer", lambda model, lr, *_: torch.optim.Adam(model.parameters(), lr), "not Adam and OneCycleLR"),
        ("make_schedule", lambda optimizer, *_: schedules.LinearLR(optimizer), "not SGD and LinearLR"),
        ("make_schedule", lambda optimizer, *_: schedules.ReduceLROnPlateau(optimizer), "needs a metric"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(utils, name, other)
            refuse("train.py", "--resume", "--out", trained, words=[words])
    assert (trained / "last.pt").read_bytes() == before


def test_dry_run_keeps_nothing(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several runs it tries one."""
    monkeypatch.chdir(tmp_path)
    for flags in (("--val-size", 100), ("--runs", 2), ("--folds", 2)):
        out, _ = call("train.py", "--dry-run", *flags)
        assert out.count(f"Final {'Validation' if '--folds' in flags else 'Test'} Accuracy") == 1
        assert "accuracy means nothing" in out.splitlines()[-1] and not any(tmp_path.iterdir())


def test_what_is_going_to_be_replaced_is_said(call, trained: Path, tiny: Path, tmp_path: Path) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    unfinished = torch.load(out / "last.pt", weights_only=True)
    torch.save({**unfinished, "history": unfinished["history"][:1]}, out / "last.pt")
    flags = ("train.py", "--epochs", 1, "--data-dir", tiny, "--out", out)
    accuracy = utils.load_checkpoint(trained / "model.pt")["metrics"]["test_accuracy"]
    lines = call(*flags)[0].splitlines()
    assert f"Replaces {out / 'model.pt'} (seed 0, 3 epochs, {accuracy:.2%})" in lines
    assert "Replaces an unfinished run after epoch 1; to go on with it, add --resume" in lines
    (out / "model.pt").write_text("no checkpoint")
    printed, _ = call(*flags)
    assert f"Replaces {out / 'model.pt'}, which is not a checkpoint of train.py" in printed.splitlines()
    assert "unfinished" not in printed


def test_what_fails_keeps_the_checkpoint(refuse, trained: Path) -> None:
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    refuse("train.py", "--lr", 1e5, "--peak-lr", 1e5, "--out", trained, words=["loss", "--peak-lr"])
    refuse("train.py", "--teacher", trained / "model.pt", "--out", trained, words=["--teacher", trained])
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


def test_a_teacher_that_has_seen_held_out_images_is_a_warning(trained: Path, capsys) -> None:
    """`trained` has held out 400: to hold out the same 400 is sound, others not."""
    for held_out in ({"val_size": 400}, {}, {"val_size": 100}, {"folds": 3, "fold": 1}):
        train.make_loss(Recipe(teacher=(str(trained / "model.pt"),), **held_out), CPU)
        assert ("held out here" in capsys.readouterr().err) == (held_out.get("val_size") == 100 or "fold" in held_out)


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


def test_runs_are_those_of_single_commands_and_are_reported(call, tiny: Path, tmp_path: Path) -> None:
    several = ("--runs", 2, "--seed", 3, "--epochs", 1, "--val-size", 100, "--data-dir", tiny)
    printed, _ = call("train.py", *several, "--out", tmp_path / "two")
    call("train.py", "--seed", 4, "--epochs", 1, "--val-size", 100, "--data-dir", tiny, "--out", tmp_path / "one")
    assert_same_bits(tmp_path / "one" / "model.pt", tmp_path / "two" / "seed-4" / "model.pt")
    assert "Epoch 1" in (tmp_path / "two" / "seed-4" / "log.txt").read_text()

    report = json.loads((tmp_path / "two" / "runs.json").read_text())
    for name in ("val_accuracy", "val_tta_accuracy", "test_accuracy", "test_tta_accuracy"):
        values = [run[name] for run in report["runs"]]
        mean, std = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
        expected = {"mean": mean, "std": std, "sem": std / math.sqrt(2), "min": min(values), "max": max(values), "n": 2}
        assert report[name] == pytest.approx(expected)
        assert re.search(f": +mean {mean:.3%}  std {std:.3%}  standard error ", printed)
    models = [utils.load_model(tmp_path / "two" / f"seed-{seed}", CPU)[0] for seed in (3, 4)]
    test = utils.load_mnist(tiny, train=False, device=CPU)
    for tta, name, line in zip((False, True), ("test_accuracy", "test_tta_accuracy"), printed.splitlines()[-2:]):
        mean = sum(utils.predict(model, test.images, tta).softmax(1) for model in models)
        accuracy = (mean.argmax(1) == test.labels).double().mean().item()
        assert report[f"ensemble_{name}"] == pytest.approx(accuracy)
        assert line.endswith(f" networks: {accuracy:.2%}")


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
    assert report["val_accuracy"]["n"] == report["val_tta_accuracy"]["n"] == 2
    assert "test_accuracy" not in report["runs"][0]


def test_forgotten_flags_of_several_runs_are_refused_before_training(
    call, refuse, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--peak-lr", 0.1, "--epochs", 1, "--data-dir", tiny)
    call("train.py", *flags, "--out", tmp_path / "seed-0")
    several = ("--runs", 2, "--resume", "--data-dir", tiny, "--out", tmp_path)
    refuse("train.py", *several, words=[tmp_path / "seed-0", "made with --epochs 1 --peak-lr 0.1"])
    refuse("train.py", *several, "--epochs", 1, words=["made with --peak-lr 0.1:"])
    refuse("train.py", "--resume", "--out", tmp_path, words=[tmp_path, "several runs", "--runs"])
    assert not (tmp_path / "seed-1").exists() and not (tmp_path / "last.pt").exists()
    monkeypatch.setattr(runs, "run_side_by_side", lambda commands, *_: [folder.name for folder in commands])
    refuse("train.py", *several, *flags, words=["seed-0, seed-1 failed"])  # all flags are there: it starts


def test_tensorboard_missing(refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refuse("train.py", "--tensorboard", tmp_path / "runs", "--out", tmp_path, words=["pip install tensorboard"])


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
    assert tags["images"] == ["augmented digits"]
    metrics = utils.load_checkpoint(out / "model.pt")["metrics"]
    assert events.Scalars("final/test_accuracy")[-1].value == pytest.approx(metrics["test_accuracy"])
