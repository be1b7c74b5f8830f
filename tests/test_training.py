"""train.py: optimiser, schedule, average by hand; every flag is heard; logs; several runs."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, RELEASED, ROOT

import train
import utils
from extras import several
from model import Net, count_parameters

RECIPE = train.parse_args([])[1]


def rates(steps: int, warmup: float) -> list[float]:
    """The rates of all steps, and the one behind the last, of a cycle from 0.015 to 0.1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = utils.make_schedule(optimizer, 0.015, 0.1, warmup, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_schedule_is_one_cycle():
    """Along half a cosine to the peak at 200 of 1,000 steps, along another to 0 behind the last."""
    up = [0.1 + (0.015 - 0.1) * (1 + math.cos(math.pi * n / 200)) / 2 for n in range(200)]
    down = [0.1 * (1 + math.cos(math.pi * n / 800)) / 2 for n in range(801)]
    assert rates(1000, 0.2) == pytest.approx(up + down, abs=1e-9)
    with pytest.raises(utils.UserError, match=r"--lr 0\.015 is above --peak-lr 0\.01"):
        utils.make_schedule(torch.optim.SGD([torch.zeros(1)], 1.0), 0.015, 0.01, 0.2, 1000)
    for steps in range(1, 30):  # of so short runs a warm-up may be a whole step, or less
        for warmup in (0.0, 0.1, 0.2, 1.0):
            assert all(0 < rate <= 0.1 + 1e-9 for rate in rates(steps, warmup)[:-1])


def test_optimizer_is_nesterov_sgd():
    optimizer = utils.make_optimizer(Net(), lr=0.1, momentum=0.9, weight_decay=0.01)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD) and group["nesterov"]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.01)


def test_weight_average_is_over_the_last_tenth():
    model, average, expected = Net(), Net(), 0.0
    for step in range(600):
        model.fc2.bias.data.fill_(float(step))
        train.update_average(average, model, step)
        expected += (step - expected) / (1 + 0.1 * step)
    assert average.fc2.bias[0].item() == pytest.approx(expected, rel=1e-4)
    assert 540 < expected < 550


def test_dropout_falls_linearly_to_zero():
    progress = ((0, 0.4), (0.1, 0.4), (0.4, 0.4), (0.9, 0.4), (0.9, 1), (0, 0))
    assert [train.dropout_factor(*p) for p in progress] == pytest.approx([1, 0.75, 0, 0, 1, 0])


def test_dropout_falls_during_the_epochs_of_the_run(build, monkeypatch):
    """To half of its rates after an eighth of the steps, to 0 after a quarter: within 4 epochs."""
    run = build("--epochs 4 --dropout-until 0.25")
    factors = []
    monkeypatch.setattr(train, "set_dropout", lambda rates, factor: factors.append(factor))
    for epoch in range(2):
        train.train_epoch(run, epoch)
    expected = [max(0.0, 1 - step / 10) for step in range(20)]  # ten steps in an epoch
    assert factors == pytest.approx(expected)


def test_distillation_loss(monkeypatch):
    g = torch.Generator().manual_seed(0)
    logits, *answers = torch.randn(3, 5, 10, generator=g)
    monkeypatch.setattr(utils, "load_model", lambda i, _: (lambda images: answers[i], {}))
    loss_fn = train.make_loss({**RECIPE, "teacher": [0, 1]}, CPU)
    target = (answers[0].softmax(1) + answers[1].softmax(1)) / 2
    soft = -(target * logits.log_softmax(1)).sum(1).mean()
    hard = -logits.log_softmax(1)[range(5), range(5)].mean()
    loss = loss_fn(logits, torch.arange(5), torch.zeros(5)).item()
    assert loss == pytest.approx((0.3 * hard + 0.7 * soft).item(), rel=1e-5)


def test_statistics_of_the_averaged_network_are_those_of_plain_digits(trained, data_dir):
    model, checkpoint = utils.load_model(trained / "model.pt", CPU)
    everything = utils.load_mnist(data_dir, train=True, device=CPU)
    split, _ = utils.make_splits(everything, checkpoint["recipe"])
    x = split.images[:: math.ceil(3600 / train.STATISTICS_IMAGES)] / 255
    for block in model.blocks:
        outputs = block.conv(x)
        mean, var = outputs.mean((0, 2, 3)), outputs.var((0, 2, 3))
        torch.testing.assert_close(block.norm.running_mean, mean, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(block.norm.running_var, var, rtol=1e-2, atol=1e-3)
        x = block(x)


WIRES = {  # setting: flags that change it, and what else is built, all else being the same
    "epochs": ("--epochs 3", {"rates"}),
    "batch_size": ("--batch-size 32", {"rates", "images"}),
    "lr": ("--lr 0.1", {"rates"}),
    "peak_lr": ("--peak-lr 0.1", {"rates"}),
    "warmup": ("--warmup 0.5", {"rates"}),
    "momentum": ("--momentum 0.8", {"optimizer"}),
    "weight_decay": ("--weight-decay 0", {"optimizer"}),
    "dropout_until": ("--dropout-until 0.6", set()),
    "dropout": ("--dropout 0.1 0.2 0.3 0", {"layers"}),
    "fc_dropout": ("--fc-dropout 0", {"layers"}),
    "rotation": ("--rotation 0", {"images"}),
    "scale": ("--scale 0", {"images"}),
    "translate": ("--translate 0", {"images"}),
    "shear": ("--shear 0", {"images"}),
    "elastic": ("--elastic 0", {"images"}),
    "hard_fraction": ("--hard-fraction 0", {"images"}),
    "variants": ("--variants", {"images"}),
    "width": ("--width 2", {"layers", "weights"}),
    "activation": ("--activation relu", {"layers"}),
    "teacher": ("--teacher TRAINED", {"loss"}),
    "train_size": ("--train-size 300", {"rates", "images"}),
    "val_size": ("--val-size 200", {"rates", "images"}),
    "folds": ("--folds 4 --fold 1", {"images"}),
    "fold": ("--folds 3 --fold 2", {"images"}),
    "seed": ("--seed 1", {"weights", "images"}),
}
BEFORE = {"fold": "--folds 3 --fold 1", "folds": "--folds 3 --fold 1"}  # instead of no flags


@pytest.fixture
def build(call, trained: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """build("--lr 1"): the run as train.py has built it; TRAINED is the folder of `trained`."""

    def build(flags: str) -> train.Run:
        def stop(run: train.Run, epoch: int) -> None:
            built.append(run)
            raise KeyboardInterrupt

        built: list[train.Run] = []
        words = flags.replace("TRAINED", str(trained)).split()
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_epoch", stop)
            call("train.py", *words, "--data-dir", tiny, "--out", tmp_path / "new", status=130)
        return built[0]

    return build


def parts_of(run: train.Run) -> dict[str, object]:
    """What a user can set, and what a few steps of the second epoch make of the network."""
    run.loader.losses = torch.arange(1.0 + len(run.loader.losses))[1:]
    logits, labels = torch.linspace(0, 99, 40).sin().view(4, 10), torch.arange(4)
    parts = {
        "layers": str(run.model),
        "weights": run.model.fc1.weight.detach().clone(),
        "optimizer": [run.optimizer.param_groups[0][name] for name in ("momentum", "weight_decay")],
        "images": next(run.loader.batches(1))[0],
        "loss": run.loss_fn(logits, labels, torch.zeros(4, 1, 28, 28)).item(),
    }
    rates = train.train_epoch(run, 1)["learning_rates"]
    return {**parts, "rates": rates, "trained": run.average.fc1.weight}


@pytest.mark.parametrize("name", [name for name in RECIPE if name != "threads"])
def test_every_flag_changes_what_it_says_and_what_is_learnt(name, build, monkeypatch):
    monkeypatch.setattr(train, "LOGS", 10_000)  # so that the rate of each step is kept
    flags, expected = WIRES[name]
    base = "--epochs 2 --dropout-until 1 --batch-size 128 "
    before = parts_of(build(base + BEFORE.get(name, "")))
    after = parts_of(build(base + flags))
    changed = {
        part for part, value in before.items()
        if not (torch.equal(value, after[part]) if torch.is_tensor(value) else value == after[part])
    }
    assert changed == {*expected, "trained"}


def test_the_specifications_recipe_is_a_command():
    text = (ROOT / "extras" / "README.md").read_text(encoding="utf-8")
    (flags,) = re.findall(r"train\.py (--activation relu [^`]*)", text)
    _, recipe = train.parse_args(flags.replace("\\", "").split())
    zeros = ("warmup", "hard_fraction", "elastic", "shear", "translate")
    assert recipe["lr"] == recipe["peak_lr"] == 0.015 and recipe["dropout_until"] == 1
    assert all(recipe[name] == 0 for name in zeros)


OUT_OF_RANGE = {
    "--epochs 0": "--epochs: 0 is not a whole number from 1",
    "--lr nan": "--lr: nan is not a number from",
    "--lr 0.2": "above --peak-lr",
    "--width 33": "from 1 to 32",
    "--dropout 0.1 0.2 0.3 0.96": "--dropout: 0.96 is not",
    "--hard-fraction 1.1": "from 0 to 1",
    "--runs 1.5": "--runs: 1.5 is not a whole number of 1 or more",
    "--folds 1": "2 or more",
    "--folds 3 --val-size 5": "--val-size",
    "--val-size 4000": "too many of 4,000",
    "--folds 401 --fold 1": "too many of 4,000",
    "--val-size 400 --train-size 3601": "too many of 4,000",
    "--teacher nowhere.pt": "nowhere.pt",
    "--runs 2 --folds 2": "--folds",
}


@pytest.mark.parametrize("flags", OUT_OF_RANGE)
def test_what_is_out_of_range_is_one_line(flags, refuse, tmp_path):
    out = tmp_path / "out"
    refuse("train.py", *flags.split(), "--out", out, words=[OUT_OF_RANGE[flags]])
    assert not out.exists()


def test_train_logs_in_the_specifications_format_and_learns(run, trained, tmp_path):
    flags = ("--epochs", 3, "--val-size", 400, "--dropout-until", 0)
    done = run("train.py", *flags, "--out", tmp_path)
    assert done.stderr == ""  # the bar is for terminals
    lines = done.stdout.splitlines()
    checkpoint = utils.load_checkpoint(tmp_path / "model.pt")
    history, metrics = checkpoint["history"], checkpoint["metrics"]
    parameters = count_parameters(Net())
    assert lines[0] == f"Training {parameters:,} parameters on 3,600 images; cpu, 1 thread"
    assert "augmented images, 50% of them hard from epoch 2 on;" in lines[1]
    assert lines[2:4] == ["Epoch 1", "Learning rate: 0.015000"]
    assert re.fullmatch(r"Train Loss: \d\.\d{4} \| Accuracy: \d+\.\d\d%", lines[4])
    assert re.fullmatch(r"Validation Loss: \d\.\d{4} \| Accuracy: \d+\.\d\d%", lines[5])
    assert lines[-2] == f"Final Test Accuracy: {metrics['test_accuracy']:.2%}"
    assert metrics["test_accuracy"] > 0.92
    assert lines[-1] == f"Trained in 0 min {sum(entry['seconds'] for entry in history):.0f} s"

    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert history[0]["train_loss"] > history[2]["train_loss"]
    for entry in history:
        assert len(entry["learning_rates"]) == len(entry["train_losses"]) == train.LOGS
    for before, after in zip(history, history[1:]):
        assert before["learning_rates"][-1] == after["learning_rate"]
    assert metrics["val_accuracy"] == history[-1]["val_accuracy"]
    parts = ("val", "val_tta", "test", "test_tta")
    assert [*metrics] == [f"{part}_{name}" for part in parts for name in ("loss", "accuracy")]
    assert checkpoint["recipe"]["weight_decay"] == 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").stat().st_size < 100_000
    assert_same_bits(trained / "model.pt", tmp_path / "model.pt")  # of the same flags


def test_losses_of_an_epoch_are_the_means_between_the_logs(build):
    """Ten steps, ten logs: each has the loss of its batch."""
    run, seen = build("--epochs 2"), []
    loss_fn = run.loss_fn
    run.loss_fn = lambda *args: seen.append(loss_fn(*args)) or seen[-1]
    found = train.train_epoch(run, 0)["train_losses"]
    assert found == pytest.approx([loss.item() for loss in seen], rel=1e-3)


def test_a_run_of_one_epoch_has_no_hard_images_and_says_none(call, tiny, tmp_path):
    """And a last batch of one image is no obstacle."""
    flags = ("--data-dir", tiny, "--out", tmp_path)
    for size in (1, 65):
        out, _ = call("train.py", "--epochs", 1, "--train-size", size, *flags)
        assert "hard" not in out and "of augmented images; on plain" in out


def assert_same_bits(a: Path, b: Path):
    """The same weights and metrics, and but for the seconds the same history."""
    first, second = utils.load_checkpoint(a), utils.load_checkpoint(b)
    for checkpoint in (first, second):
        for entry in checkpoint["history"]:
            entry["seconds"] = 0
    assert first["metrics"] == second["metrics"] and first["history"] == second["history"]
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name


def test_resume_keeps_the_recipe(call, refuse, unfinished, trained, tiny, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "out")
    changes = ("--epochs 4", "--dropout 0 0 0 0", "--seed 1", "--variants")
    for folder in (out, trained):  # one that is not finished, one that is
        for flags in changes:
            words = [flags.split()[0], "cannot change that"]
            refuse("train.py", "--resume", *flags.split(), "--out", folder, words=words)
    refuse("train.py", "--resume", "--dropout", 0, 0, 0, 0, "--out", out, words=["0.1 0.2 0.3 0.4"])
    call("train.py", "--resume", "--epochs", 3, "--data-dir", tiny, "--out", out)
    assert utils.load_checkpoint(out / "model.pt")["recipe"] == {**RECIPE, "epochs": 3}
    printed, _ = call("train.py", "--resume", "--epochs", 3, "--out", out)
    assert f"{out} is finished" in printed and "Final Test Accuracy" in printed


OTHERS = {
    "make_optimizer": lambda model, lr, *_: torch.optim.Adam(model.parameters(), lr),
    "make_schedule": lambda optimizer, *_: torch.optim.lr_scheduler.ConstantLR(optimizer),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimiser_or_schedule_is_refused(name, refuse, unfinished, tiny, monkeypatch):
    monkeypatch.setattr(utils, name, OTHERS[name])
    words = ["not Adam and OneCycleLR" if name == "make_optimizer" else "not SGD and ConstantLR"]
    flags = ("--data-dir", tiny, "--out", unfinished)
    refuse("train.py", "--resume", *flags, words=words)


SPOILT = {  # what of the training's state is spoilt
    "losses": lambda state: state["losses"].new_zeros(3),
    "weights": lambda state: {"fc1.bias": torch.zeros(72)},
    "optimizer": lambda state: {"state": {}, "param_groups": []},
}


@pytest.mark.parametrize("part", SPOILT)
def test_a_spoilt_training_state_is_one_line(part, refuse, unfinished, tiny, tmp_path):
    checkpoint = torch.load(unfinished / "last.pt", weights_only=True)
    checkpoint["training"][part] = SPOILT[part](checkpoint["training"])
    torch.save(checkpoint, tmp_path / "last.pt")
    flags = ("--resume", "--data-dir", tiny, "--out", tmp_path)
    refuse("train.py", *flags, words=[tmp_path / "last.pt"])


def test_rates_of_numpy_are_kept_as_numbers(call, tiny, tmp_path, monkeypatch):
    """A schedule of one's own may have them, and checkpoints are read by weights alone."""

    def schedule(optimizer, *_):
        table = np.linspace(1, 0.5, 100)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: table[step])

    monkeypatch.setattr(utils, "make_schedule", schedule)
    call("train.py", "--epochs", 2, "--data-dir", tiny, "--out", tmp_path)
    assert utils.load_checkpoint(tmp_path / "model.pt")["history"][0]["learning_rate"] == 0.015


def test_dry_run_keeps_nothing(call, tmp_path, monkeypatch):
    """Of several runs it tries one, and it reads its checkpoint back."""
    monkeypatch.chdir(tmp_path)
    for flags in (("--val-size", 100), ("--runs", 2), ("--folds", 2)):
        out, _ = call("train.py", "--dry-run", *flags)
        name = "Validation" if "--folds" in flags else "Test"
        assert out.count(f"Final {name} Accuracy") == 1
        assert "accuracy means nothing" in out.splitlines()[-1] and not any(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(utils.UserError, match="is missing"):
        patch.setattr(train, "save", lambda run, path, **_: torch.save({}, path))
        train.main(["--dry-run"])


def test_what_fails_keeps_the_checkpoint(refuse, trained):
    before = (trained / "model.pt").read_bytes()
    flags = ("train.py", "--out", trained, "--lr", 1e6, "--peak-lr", 1e6, "--weight-decay", 1)
    refuse(*flags, words=["not finite", "--peak-lr"])
    refuse("train.py", "--teacher", trained, "--out", trained, words=["--teacher", trained])
    assert [path.read_bytes() for path in trained.iterdir()] == [before]


@pytest.mark.original
def test_teachers_may_move_and_a_folder_of_runs_is_as_many(
    call, refuse, trained, tiny, tmp_path, monkeypatch
):
    for seed in (0, 1):
        shutil.copytree(trained, tmp_path / "runs" / f"seed-{seed}")
    monkeypatch.chdir(tmp_path)
    flags = ("--data-dir", tiny, "--out", "student")
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda *_: exec("raise KeyboardInterrupt"))
        call("train.py", "--epochs", 1, "--teacher", "runs", *flags, status=130)
    expected = [str(tmp_path / "runs" / f"seed-{seed}" / "model.pt") for seed in (0, 1)]
    assert utils.load_checkpoint(Path("student/last.pt"))["recipe"]["teacher"] == expected
    (tmp_path / "runs").rename(tmp_path / "moved")
    refuse("train.py", "--resume", *flags, words=["runs/seed-0/model.pt is not there", "--teacher"])
    words = ["learnt from other networks"]
    refuse("train.py", "--resume", "--teacher", RELEASED, *flags, words=words)
    call("train.py", "--resume", "--teacher", "moved", *flags)
    (tmp_path / "empty").mkdir()
    refuse("train.py", "--teacher", "empty", "--out", "out", words=["no empty/model.pt"])


def test_runs_are_those_of_single_commands_and_are_reported(call, tiny, tmp_path):
    flags = ("--epochs", 1, "--val-size", 100, "--data-dir", tiny)
    (tmp_path / "two" / "seed-4").mkdir(parents=True)
    (tmp_path / "two" / "seed-4" / "last.pt").write_text("an older one")
    printed, _ = call("train.py", "--runs", 2, "--seed", 3, *flags, "--out", tmp_path / "two")
    assert printed.startswith(f"Replaces seed-4 in {tmp_path / 'two'}; to go on with them, add")
    call("train.py", "--seed", 4, *flags, "--out", tmp_path / "one")
    assert_same_bits(tmp_path / "one" / "model.pt", tmp_path / "two" / "seed-4" / "model.pt")
    assert "Epoch 1" in (tmp_path / "two" / "seed-4" / "log.txt").read_text()

    report = json.loads((tmp_path / "two" / "runs.json").read_text())
    for name in several.TITLES:
        values = [run[name] for run in report["runs"]]
        mean, std = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
        spread = {"std": std, "sem": std / math.sqrt(2), "min": min(values), "max": max(values)}
        assert report[name] == pytest.approx({"mean": mean, **spread, "n": 2})
        assert re.search(f": +mean {mean:.3%}  std {std:.3%}  standard error ", printed)


def run_here(commands: dict[Path, list[str]], *_: object) -> list[str]:
    """Instead of `several.run_side_by_side`, to save the time of starting processes."""
    failed = []
    for folder, words in commands.items():
        try:
            train.main(words[2:])
        except utils.UserError:
            failed.append(folder.name)
    return failed


def test_folds_fail_by_name_and_resume_with_the_rest(call, refuse, tiny, tmp_path, monkeypatch):
    folds = ("--folds", 2, "--epochs", 1, "--data-dir", tiny, "--out", tmp_path)
    (tmp_path / "fold-1").write_text("where a folder is needed")
    refuse("train.py", *folds, words=["cannot write", "fold-1"])
    (tmp_path / "fold-1").unlink()
    (tmp_path / "fold-1" / "last.pt").mkdir(parents=True)  # where a file is to be written
    monkeypatch.setattr(several, "run_side_by_side", run_here)
    refuse("train.py", *folds, words=["fold-1 failed", "--resume"])
    assert (tmp_path / "fold-2" / "model.pt").exists() and not (tmp_path / "runs.json").exists()
    (tmp_path / "fold-1" / "last.pt").rmdir()
    out, _ = call("train.py", *folds, "--resume")
    assert f"{tmp_path / 'fold-2'} is finished" in out
    report = json.loads((tmp_path / "runs.json").read_text())
    assert report["val_accuracy"]["n"] == report["val_tta_accuracy"]["n"] == 2
    assert "test_accuracy" not in report["runs"][0]


def test_forgotten_flags_of_several_runs_are_refused_before_training(
    call, refuse, tiny, tmp_path
):
    flags = ("--peak-lr", 0.1, "--epochs", 1, "--data-dir", tiny)
    call("train.py", *flags, "--out", tmp_path / "seed-0")
    runs = ("--runs", 2, "--resume", "--data-dir", tiny, "--out", tmp_path)
    words = [tmp_path / "seed-0", "made with --epochs 1 --peak-lr 0.1"]
    refuse("train.py", *runs, words=words)
    refuse("train.py", *runs, "--epochs", 1, words=["made with --peak-lr 0.1:"])
    refuse("train.py", "--resume", "--out", tmp_path, words=[tmp_path, "several runs", "--runs"])
    assert not (tmp_path / "seed-1").exists() and not (tmp_path / "last.pt").exists()


def test_tensorboard_has_curves_images_and_hyperparameters(
    call, refuse, tiny, tmp_path, monkeypatch
):
    """Without the package, or in a place that cannot be written, it is one line."""
    board, out = tmp_path / "runs", tmp_path / "out"
    flags = ("--val-size", 100, "--data-dir", tiny, "--out", out, "--tensorboard")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        refuse("train.py", *flags, board, words=["pip install tensorboard"])
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "file").touch()
    refuse("train.py", *flags, tmp_path / "file" / "below", words=["cannot write"])
    call("train.py", "--epochs", 2, *flags, board)
    events = accumulator.EventAccumulator(str(board / "out"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    curves = {"loss/train", "loss/val", "accuracy/train", "accuracy/val", "learning_rate"}
    assert curves <= set(tags["scalars"]) and tags["images"] == ["augmented images"]
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2]
    metrics = utils.load_checkpoint(out / "model.pt")["metrics"]
    accuracy = events.Scalars("final/test_accuracy")[-1].value
    assert accuracy == pytest.approx(metrics["test_accuracy"])
