"""Stops, full disks, two trainings at once, damaged, hostile files."""

import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest
import torch
from conftest import CPU, ROOT, flip
from test_training import assert_same_bits

import train
import utils
from model import Net
from utils import UserError, locked

resource = pytest.importorskip("resource", reason="kills and limits are those of Unix")


# train.py that kills itself after the n-th call of a function. argv: its module and name, n, flags.
AIMED_KILL = """
import os, signal, sys, train, utils
owner, name, left = {"os": os, "utils": utils}[sys.argv[1]], sys.argv[2], int(sys.argv[3])
original = getattr(owner, name)

def aimed(*args, **kwargs):
    global left
    result, left = original(*args, **kwargs), left - 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, aimed)
utils.run_script(lambda: train.main(sys.argv[4:]))
"""


# Each epoch writes last.pt and renames it; the end reads the test set and replaces it by model.pt.
MOMENTS = [("os", "replace", 1), ("os", "fsync", 2), ("utils", "predict", 1), ("os", "replace", 4)]


# Three passes an epoch: the later ones depend on the losses that images last had.
FLAGS = ("--device", "cpu", "--epochs", 3, "--batch-size", 128, "--dropout-until", 0.5)


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    train.main(list(map(str, (*FLAGS, "--data-dir", tiny, "--out", out))))
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_training_is_whole_and_resumes_to_the_same_bits(
    moment, call, refuse, tiny, undisturbed, tmp_path
):
    out = tmp_path / "killed"
    words = [sys.executable, "-c", AIMED_KILL, *moment, *FLAGS, "--data-dir", tiny, "--out", out]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    utils.load_model(out / "last.pt", CPU)
    if moment != MOMENTS[-1]:  # whoever looks for the network is told what goes on with it
        words = [out / "last.pt", "not finished: its command with --resume goes on"]
        refuse("test_model.py", "--checkpoint", out, words=words)
        refuse("visualize_errors.py", "--checkpoint", out / "model.pt", words=words)
    call("train.py", "--resume", "--data-dir", tiny, "--out", out)
    assert_same_bits(undisturbed / "model.pt", out / "model.pt")
    assert [path.name for path in out.iterdir()] == ["model.pt"]


def start(written: Path, *args: object) -> subprocess.Popen:
    """train.py in the background, once it has `written` a file; no shell shields it from Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "train.py", "--device", "cpu", *map(str, args)],
        cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not written.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def test_ctrl_c_and_a_second_training_into_the_same_folder(call, refuse, tiny, tmp_path):
    out = tmp_path / "my runs"
    process = start(out / "last.pt", "--epochs", 1000, "--data-dir", tiny, "--out", out)
    flags = ("--data-dir", tiny, "--out", out)
    refuse("train.py", "--epochs", 1, *flags, words=["another training writes to", out])
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    checkpoint = utils.load_checkpoint(out / "last.pt")
    assert checkpoint["recipe"]["epochs"] == 1000
    kept = f"Stopped. {len(checkpoint['history'])} of 1000 epochs are kept; "
    assert errors.strip() == kept + "the same command with --resume goes on."
    with locked(out):  # the lock went with the process
        pass


def interrupt(*_: object):
    raise KeyboardInterrupt


def test_a_stop_in_the_first_epoch_says_that_nothing_is_kept(call, tiny, tmp_path, monkeypatch):
    """And --resume says what it finds: nothing, or an older training."""
    flags = ("train.py", "--epochs", 3, "--data-dir", tiny, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupt)
        _, err = call(*flags, status=130)
    assert "Nothing is kept of this training; the same command starts it again." in err
    out, _ = call(*flags, "--resume")
    assert f"--resume found no training in {tmp_path}: a new one starts" in out
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupt)
        out, err = call(*flags, status=130)
    assert f"Replaces {tmp_path / 'model.pt'}" in out and "Nothing is kept of this" in err
    assert f"{tmp_path} is finished" in call(*flags, "--resume")[0]


def test_a_stop_behind_the_last_write_does_not_say_that_nothing_is_kept(
    call, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "print_result", interrupt)
    flags = ("--epochs", 1, "--data-dir", tiny, "--out", tmp_path)
    assert "1 of 1 epochs are kept" in call("train.py", *flags, status=130)[1]


def test_a_stop_while_it_is_measured_loses_nothing(call, tiny, tmp_path, monkeypatch):
    flags = ("train.py", "--epochs", 1, "--data-dir", tiny, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", interrupt)
        _, err = call(*flags, status=130)
    assert "1 of 1 epochs are kept" in err and "--resume" in err
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupt)
        _, err = call(*flags, status=130)
    assert "Nothing is kept of this training; --resume goes on with the one before it." in err
    assert len(utils.load_checkpoint(tmp_path / "last.pt")["history"]) == 1
    out, _ = call(*flags)
    assert f"Replaces {tmp_path}, a training that is not finished" in out.splitlines()[1]
    assert "add --resume" in out.splitlines()[1]


def test_sigterm_stops_all_of_several_runs_as_ctrl_c_does(tiny, tmp_path):
    flags = ("--runs", 3, "--jobs", 2, "--epochs", 1000, "--data-dir", tiny, "--out", tmp_path)
    process = start(tmp_path / "seed-1" / "last.pt", *flags)
    while not (tmp_path / "seed-0" / "last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130 and "the same command with --resume goes on" in errors
    for seed in (0, 1):
        utils.load_checkpoint(tmp_path / f"seed-{seed}" / "last.pt")
        log = (tmp_path / f"seed-{seed}" / "log.txt").read_text()
        assert "epochs are kept; the same command with --resume goes on." in log
        with locked(tmp_path / f"seed-{seed}"):
            pass
    assert not (tmp_path / "seed-2").exists()


def test_a_full_disk_keeps_the_checkpoint(refuse, trained, tiny, tmp_path):
    """A file-size limit breaks the write half way, as a full disk does."""
    out = shutil.copytree(trained, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        flags = ("--epochs", 1, "--data-dir", tiny, "--out", out)
        refuse("train.py", *flags, words=["cannot write", out / "last.pt"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (path,) = out.iterdir()
    assert path.read_bytes() == (trained / "model.pt").read_bytes()


def test_places_that_cannot_be_written(refuse, trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refuse("train.py", "--epochs", 1, "--out", out, words=["cannot write", out])
    place = tmp_path / "file" / "r.json"
    for script, flag in (("test_model.py", "--json"), ("visualize_errors.py", "--out")):
        refuse(script, "--checkpoint", trained, flag, place, words=["cannot write", place])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_goes_nowhere(environment, trained, tmp_path, refuse):
    pipe = tmp_path / "pipe"
    subprocess.run(["mkfifo", pipe], check=True)  # as /dev/null
    flags = ("--checkpoint", trained, "--json", pipe)
    refuse("test_model.py", *flags, words=["not an ordinary file"])
    command = [sys.executable, "test_model.py", "--checkpoint", str(trained / "model.pt")]
    with open("/dev/full", "w") as full_disk:
        streams = {"stdout": full_disk, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=ROOT, env=environment, **streams)
    assert done.returncode == 2 and "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    streams["stdout"] = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
    process.stdout.close()  # as `| true` does
    assert "Traceback" not in process.stderr.read() and process.wait() == 1


class Evil(str):
    """Unpickled by an unsafe reader, it creates the file of this name."""

    def __reduce__(self):
        return open, (str(self), "w")


# Of good contents and the file to trap: what torch.save writes.
BAD: dict[str, Callable[[dict, Path], object]] = {
    "code": lambda good, trap: {**good, "metrics": Evil(trap)},
    "whole network": lambda good, trap: Net(),
    "list": lambda good, trap: [1, 2],
    "parts missing": lambda good, trap: {"model": good["model"]},
    "another width": lambda good, trap: {**good, "recipe": {**good["recipe"], "width": 3}},
    "another recipe": lambda good, trap: {**good, "recipe": {"epochs": 3}},
    "another network": lambda good, trap: {**good, "model": {"x": good["fingerprint"]}},
    "another fingerprint": lambda good, trap: {**good, "fingerprint": good["fingerprint"] + 0.1},
    "text": lambda good, trap: b"hello",  # as it is
    "pickle": lambda good, trap: pickle.dumps(Evil(trap)),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_checkpoints_are_one_line_and_run_no_code(how, refuse, trained, tmp_path):
    path, trap = tmp_path / "bad.pt", tmp_path / "trap"
    bad = BAD[how](torch.load(trained / "model.pt", weights_only=True), trap)
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    else:
        torch.save(bad, path)
    refuse("test_model.py", "--checkpoint", path, words=[path])
    assert not trap.exists()


def test_a_missing_checkpoint_is_one_line_that_says_what_is_there(refuse, trained, tmp_path):
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "nowhere"):
        refuse("test_model.py", "--checkpoint", path, words=[path, "`python train.py` makes one"])
    shutil.copytree(trained, tmp_path / "seed-0")
    words = [f"there is no {tmp_path / 'model.pt'}; there is {tmp_path / 'seed-0' / 'model.pt'}"]
    refuse("test_model.py", "--checkpoint", tmp_path / "model.pt", words=words)


def test_a_flipped_bit_anywhere_or_half_a_file_is_refused_or_harmless(trained, tmp_path):
    """A bit in the archive's padding changes nothing."""
    data, path, refusals = (trained / "model.pt").read_bytes(), tmp_path / "bad.pt", 0
    good = utils.load_checkpoint(trained / "model.pt")["model"]
    flipped = [flip(data, at) for at in range(0, len(data), len(data) // 30)]
    for damaged in (data[:40_000], *flipped):
        path.write_bytes(damaged)
        try:
            model, _ = utils.load_model(path, CPU)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refusals += 1
        else:
            for name, tensor in model.state_dict().items():
                assert torch.equal(good[name], tensor)
    assert refusals > 10


def test_other_training_data_are_not_resumed_with(refuse, unfinished, tiny, tmp_path):
    """Nor the same images with another label, by which they are held out."""
    data = shutil.copytree(tiny, tmp_path / "data")
    labels = data / "train-labels-idx1-ubyte"
    labels.write_bytes(flip(labels.read_bytes(), -1))
    flags = ("--resume", "--data-dir", data, "--out", unfinished)
    refuse("train.py", *flags, words=["trained on other images", unfinished / "last.pt"])


def test_a_mistake_in_ones_own_code_keeps_its_traceback(monkeypatch):
    for mistake in (FileNotFoundError(2, "No such file", "mine.txt"), ValueError("mine")):
        with pytest.raises(type(mistake)):
            utils.run_script(lambda mistake=mistake: (_ for _ in ()).throw(mistake))
