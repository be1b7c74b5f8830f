"""test_model.py: its report and exports; how all scripts start and end; one whole epoch."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, MAINS, ROOT, idx, mnist

import utils
from model import Net, count_parameters


def test_report_agrees_with_itself_and_with_training(run, trained, tmp_path):
    done = run("test_model.py", "--checkpoint", trained / "model.pt", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    confusion = torch.tensor(report["confusion_matrix"])
    assert confusion.sum() == report["count"] == 1000
    assert report["errors"] == 1000 - int(confusion.trace())
    assert report["errors"] == sum(row["errors"] for row in report["classes"])
    assert report["accuracy"] == pytest.approx(1 - report["errors"] / 1000)
    metrics = utils.load_checkpoint(trained / "model.pt")["metrics"]
    assert report["accuracy"] == metrics["test_accuracy"]
    assert report["loss"] == metrics["test_loss"]
    three = report["classes"][3]
    assert three["recall"] == pytest.approx(int(confusion[3, 3]) / int(confusion[3].sum()))
    assert three["precision"] == pytest.approx(int(confusion[3, 3]) / int(confusion[:, 3].sum()))
    assert report["parameters"] == count_parameters(Net())
    errors = f"({report['errors']} errors in 1,000)"
    assert f"Test accuracy:  {report['accuracy']:.2%}  {errors}" in done.stdout
    *_, seven, _, _ = done.stdout.splitlines()  # the rows are the true digits
    assert seven.split() == ["7", *(str(count or ".") for count in confusion[7].tolist())]


def test_each_split_is_measured_with_one_look_or_nine(call, trained):
    flags = ("test_model.py", "--checkpoint", trained / "model.pt")
    metrics = utils.load_checkpoint(trained / "model.pt")["metrics"]
    assert metrics["test_tta_loss"] != metrics["test_loss"]
    report = json.loads(call(*flags, "--tta", "--json", "-")[0])
    assert report["tta"] and report["accuracy"] == metrics["test_tta_accuracy"]
    assert report["loss"] == metrics["test_tta_loss"]
    nine = "nine at images under 99% sure"
    for tta, name, looks in (((), "val", "one"), (("--tta",), "val_tta", nine)):
        lines = call(*flags, *tta, "--split", "val")[0].splitlines()
        accuracy = metrics[f"{name}_accuracy"]
        errors = f"({round(400 * (1 - accuracy))} errors in 400)"
        assert lines[2].split(maxsplit=1) == ["Looks:", looks]
        assert lines[3] == f"Validation accuracy:  {accuracy:.2%}  {errors}"
    assert json.loads(call(*flags, "--split", "train", "--json", "-")[0])["count"] == 3600


def test_flags_that_would_be_ignored_are_refused(refuse, tmp_path):
    pairs = ("test_model --images", "visualize_errors --images", "test_model --export")
    for script, flag in map(str.split, pairs):
        for other in (("--split", "val"), ("--data-dir", tmp_path), ("--tta",)):
            words = [flag, "does not go with", other[0]]
            refuse(f"{script}.py", flag, "m.html", *other, words=words)
    for other in ("--raw", "--labels"):
        refuse("test_model.py", other, words=[f"{other} goes with --images"])
    words = ["model.txt", "must end in .onnx or .html"]
    refuse("test_model.py", "--export", "model.txt", words=words)


@pytest.mark.parametrize("script", ["test_model.py", "visualize_errors.py"])
def test_a_test_set_of_one_image(script, call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for digit, label, tta in ((0, 7, ()), (8, 0, ("--tta",))):
        image = mnist(train=False).images[digit, 0]
        (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(image[None].numpy()))
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([label])))
        out, err = call(script, "--checkpoint", trained, "--data-dir", tmp_path, *tta)
        words = "in 1)" if script == "test_model.py" else "of 1 test images misread"
        assert words in out and not err


def test_a_checkpoint_is_a_file_or_the_folder_of_one_run(call, refuse, trained, tmp_path):
    file = shutil.copytree(trained, tmp_path / "seed-0") / "model.pt"
    for path in (file, file.parent, tmp_path):
        report = json.loads(call("test_model.py", "--checkpoint", path, "--json", "-")[0])
        assert report["checkpoint"] == str(file)
    shutil.copytree(trained, tmp_path / "seed-1")
    for script in ("test_model.py", "visualize_errors.py"):
        refuse(script, "--checkpoint", tmp_path, words=[tmp_path, "several runs (seed-0, seed-1)"])


def test_one_epoch_on_the_whole_of_mnist(call, tmp_path):
    out, _ = call("train.py", "--epochs", 1, "--data-dir", ROOT / "data", "--out", tmp_path)
    assert float(re.search(r"Final Test Accuracy: (\S+)%", out)[1]) > 98


def test_mains_need_no_command_line_no_real_stdout_and_no_main_thread(
    tiny, tmp_path, monkeypatch
):
    """In a notebook or a window, stdout can be written to and no more."""
    written = []
    stdout = SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "argv", ["notebook", "--unknown"])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("MNIST_DATA_DIR", str(tiny))
    read = partial(MAINS["test_model.py"], ["--checkpoint", str(tmp_path)])
    with ThreadPoolExecutor(1) as pool:
        flags = ["--epochs", "1", "--out", str(tmp_path)]
        assert pool.submit(MAINS["train.py"], flags).result() == 0
        assert pool.submit(read).result() == 0
    with pytest.raises(SystemExit) as stop:
        utils.run_script(read)
    text = "".join(written)
    assert not stop.value.code and text.count("Confusion matrix") == 2
    assert "Final Test Accuracy" in text


def test_the_five_files_run_without_extras(tiny, environment, tmp_path):
    for name in ("model.py", "utils.py", *MAINS):
        shutil.copy(ROOT / name, tmp_path)
    calls = "model.main(); train.main([*'--epochs 1 --val-size 100'.split()]); "
    calls += "test_model.main([]); visualize_errors.main([])"
    command = [sys.executable, "-c", f"import model, train, test_model, visualize_errors; {calls}"]
    env = {**environment, "MNIST_DATA_DIR": str(tiny)}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 6


def test_a_gpu_that_cannot_be_used_is_one_line(call, refuse, tiny, trained, monkeypatch):
    """auto takes the CPU; here PyTorch says that there is a GPU, and fails at the first use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flags = ("--data-dir", tiny, "--checkpoint", trained)
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        words = ["--device cuda: ", "--device cpu"]
        refuse("test_model.py", *flags, "--device", "cuda", words=words)
        out, err = call("test_model.py", *flags, "--device", "auto")
        assert "errors in 50)" in out and len(err.splitlines()) == 1
        assert "warning: the GPU cannot be used, the CPU is: " in err


@pytest.mark.original
def test_weight_of_the_files():
    five = [ROOT / name for name in ("model.py", "utils.py", *MAINS)]
    limits = {
        91: five, 69: (ROOT / "extras").glob("*.py"), 128: (ROOT / "tests").glob("*.py"),
        12: [ROOT / "README.md"], 15: [ROOT / "extras" / "README.md"],
    }
    for limit, files in limits.items():
        assert sum(path.stat().st_size for path in files) <= 1000 * limit, limit
    page = (ROOT / "assets" / "draw.html").read_bytes()
    assert len(re.sub(b'<script id="network".*', b"", page)) <= 53_000
    for path in (*five, *(ROOT / "extras").glob("*.py")):
        assert max(map(len, path.read_text(encoding="utf-8").split("\n"))) <= 100, path


def test_onnx_missing(refuse, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    flags = ("--checkpoint", trained / "model.pt", "--export", tmp_path / "m.onnx")
    refuse("test_model.py", *flags, words=["pip install onnx onnxscript"])
    assert not any(tmp_path.iterdir())


def test_onnx_gives_the_same_logits(call, trained, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime, path = pytest.importorskip("onnxruntime"), tmp_path / "m.onnx"
    out, _ = call("test_model.py", "--checkpoint", trained, "--export", path)
    assert f"Wrote {path}\n" == out
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model, _ = utils.load_model(trained, CPU)
    for batch in (1, 7):
        x = torch.randn(batch, 1, 28, 28)
        (logits,) = session.run(None, {"image": x.numpy()})
        expected = model(x).detach()
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)
