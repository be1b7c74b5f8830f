"""Nothing lost, nothing let in: kills, interrupts, full disks, two trainings at once, damaged and hostile files."""

import errno
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable
from unittest import mock

import pytest
import torch
from conftest import CPU, ROOT, flip
from test_training import assert_same_bits

import utils
from extras.several import locked
from model import Net
from utils import UserError

resource = pytest.importorskip("resource", reason="kills and limits are those of Unix")


# train.py that kills itself after the n-th call of one function. argv: its module and name, n, train.py's flags.
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


# Each epoch writes last.pt and renames it; the run's end reads the test set.
@pytest.mark.parametrize("moment", [("os", "replace", 1), ("os", "fsync", 2), ("utils", "predict", 1)])
def test_a_killed_training_is_whole_and_resumes_to_the_same_bits(moment: tuple, call, tiny, tmp_path: Path) -> None:
    # Two passes an epoch: the second, of 120 images, depends on the losses that images last had.
    flags = ("--epochs", 3, "--batch-size", 520, "--dropout-until", 0.5, "--data-dir", tiny)
    call("train.py", *flags, "--out", tmp_path / "undisturbed")
    out = tmp_path / "killed"
    words = [sys.executable, "-c", AIMED_KILL, *moment, *flags, "--device", "cpu", "--out", out]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(out.iterdir())) == (2 if "fsync" in moment else 1)  # and a file that was not renamed
    utils.load_model(out / "last.pt", CPU)
    call("train.py", "--resume", "--data-dir", tiny, "--out", out)
    assert_same_bits(tmp_path / "undisturbed" / "model.pt", out / "model.pt")
    assert sorted(p.name for p in out.iterdir()) == ["last.pt", "model.pt"]


def start(written: Path, *args: object) -> subprocess.Popen:
    """train.py in the background, once it has `written` a file; in a process group that a shell does not shield."""
    process = subprocess.Popen(
        [sys.executable, "train.py", "--device", "cpu", *map(str, args)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not written.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def test_ctrl_c_and_a_second_training_into_the_same_folder(refuse, tiny: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "last.pt", "--epochs", 1000, "--data-dir", tiny, "--out", tmp_path)
    refuse("train.py", "--epochs", 1, "--out", tmp_path, words=["another training writes to", tmp_path])
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "go on with --resume" in errors and "Traceback" not in errors
    assert utils.load_checkpoint(tmp_path / "last.pt")["recipe"]["epochs"] == 1000
    with locked(tmp_path):  # the lock went with the process
        pass


def test_a_folder_that_cannot_be_locked_is_a_warning(call, tiny: Path, tmp_path: Path) -> None:
    """Some network file systems have no locks."""
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
        _, err = call("train.py", "--epochs", 1, "--data-dir", tiny, "--out", tmp_path)
    assert (tmp_path / "model.pt").exists()
    assert len(err.splitlines()) == 1 and "warning" in err and f"{tmp_path} cannot be locked (No locks" in err


def test_sigterm_stops_all_of_several_runs_as_ctrl_c_does(tiny: Path, tmp_path: Path) -> None:
    """It reaches the parent alone, which hands it on."""
    flags = ("--runs", 3, "--jobs", 2, "--epochs", 1000, "--data-dir", tiny, "--out", tmp_path)
    process = start(tmp_path / "seed-1" / "last.pt", *flags)
    while not (tmp_path / "seed-0" / "last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130 and "the same command with --resume goes on" in errors
    for seed in (0, 1):
        utils.load_checkpoint(tmp_path / f"seed-{seed}" / "last.pt")
        assert "Finished epochs are kept" in (tmp_path / f"seed-{seed}" / "log.txt").read_text()
        with locked(tmp_path / f"seed-{seed}"):
            pass
    assert not (tmp_path / "seed-2").exists()


def test_a_full_disk_keeps_the_checkpoint(environment: dict, trained: Path, tmp_path: Path) -> None:
    """A file-size limit breaks the write half way, as a full disk does."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = subprocess.run(
        [sys.executable, "train.py", "--epochs", "1", "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
        env=environment, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "last.pt" in done.stderr.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_places_that_cannot_be_written(refuse, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refuse("train.py", "--epochs", 1, "--out", out, words=["cannot write", out])
    place = tmp_path / "file" / "r.json"
    refuse("test_model.py", "--checkpoint", trained / "model.pt", "--json", place, words=["cannot write", place])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_goes_nowhere(environment: dict, trained: Path, tmp_path: Path, refuse) -> None:
    subprocess.run(["mkfifo", tmp_path / "pipe"], check=True)  # as /dev/null, which root could replace by a file
    refuse("test_model.py", "--checkpoint", trained, "--json", tmp_path / "pipe", words=["not an ordinary file"])
    command = [sys.executable, "test_model.py", "--checkpoint", str(trained / "model.pt")]
    with open("/dev/full", "w") as full_disk:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full_disk, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
    process.stdout.close()  # as `| true` does
    assert "Traceback" not in process.stderr.read() and process.wait() == 1


class Evil(str):
    """Unpickled by an unsafe reader, it creates the file of this name."""

    def __reduce__(self):
        return open, (str(self), "w")


BAD: dict[str, Callable[[dict, Path], object]] = {  # of good contents and the file to trap: what torch.save writes
    "code": lambda good, trap: {**good, "metrics": Evil(trap)},
    "whole network": lambda good, trap: Net(),
    "list": lambda good, trap: [1, 2],
    "parts missing": lambda good, trap: {"model": good["model"]},
    "another width": lambda good, trap: {**good, "recipe": {**good["recipe"], "width": 3}},
    "another recipe": lambda good, trap: {**good, "recipe": {"epochs": 3}},
    "another network": lambda good, trap: {**good, "model": {**good["model"], "fc3.bias": torch.zeros(10)}},
    "text": lambda good, trap: b"hello",  # as it is
    "pickle": lambda good, trap: pickle.dumps(Evil(trap)),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_checkpoints_are_one_line_and_run_no_code(how: str, refuse, trained: Path, tmp_path: Path) -> None:
    path, trap = tmp_path / "bad.pt", tmp_path / "trap"
    bad = BAD[how](torch.load(trained / "model.pt", weights_only=True), trap)
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    else:
        torch.save(bad, path)
    refuse("test_model.py", "--checkpoint", path, words=[path])
    assert not trap.exists()


def test_a_missing_checkpoint_is_one_line_that_says_how_to_make_one(refuse, tmp_path: Path) -> None:
    refuse("test_model.py", "--checkpoint", tmp_path / "none.pt", words=[tmp_path / "none.pt", "`python train.py`"])
    refuse("test_model.py", "--checkpoint", tmp_path, words=["no model.pt in", tmp_path])  # a folder


def test_a_flipped_bit_anywhere_or_half_a_file_is_refused_or_harmless(trained: Path, tmp_path: Path) -> None:
    """A bit in the archive's padding changes nothing."""
    data, path, refusals = (trained / "model.pt").read_bytes(), tmp_path / "bad.pt", 0
    good = utils.load_checkpoint(trained / "model.pt")["model"]
    for damaged in (data[:40_000], *(flip(data, at) for at in range(0, len(data), len(data) // 30))):
        path.write_bytes(damaged)
        try:
            model, _ = utils.load_model(path, CPU)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refusals += 1
        else:
            assert all(torch.equal(good[name], tensor) for name, tensor in model.state_dict().items())
    assert refusals > 10


def test_other_training_images_are_not_resumed_with(refuse, trained: Path, tiny: Path) -> None:
    flags = ("--resume", "--data-dir", tiny, "--out", trained)
    refuse("train.py", *flags, words=["trained on other images", trained / "last.pt"])
