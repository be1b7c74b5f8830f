"""Nothing lost, nothing let in: kills, interrupts, full disks, two trainings at once, damaged and hostile files."""

from __future__ import annotations

import copy
import io
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
import torch
from conftest import CPU, MAINS, ROOT, flip
from test_training import assert_same_bits

import train
import utils
from utils import UserError

resource = pytest.importorskip("resource", reason="kills and limits are those of Unix")

# --- kills, interrupts, full disks -----------------------------------------------------------------------------------

# train.py that kills itself after the n-th call of one function. argv: name, n, train.py's flags.
AIMED_KILL = """
import os, signal, sys
import train, utils

name, left = sys.argv.pop(1), int(sys.argv.pop(1))
owner = {"replace": os, "predict": utils}[name]
original = getattr(owner, name)

def aimed(*args, **kwargs):
    global left
    left -= 1
    result = original(*args, **kwargs)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, aimed)
utils.run_script(train.main)
"""


# Each epoch replaces last.pt; the run's end reads the test set.
@pytest.mark.parametrize("moment", [("replace", 1), ("replace", 2), ("predict", 1)])
def test_a_killed_training_is_whole_and_resumes_to_the_same_bits(moment: tuple, call, tiny, tmp_path: Path) -> None:
    # Two passes an epoch: the second, of 120 images, depends on the losses that images last had.
    flags = ("--epochs", 3, "--batch-size", 520, "--dropout-until", 0.5, "--data-dir", tiny)
    call("train.py", *flags, "--out", tmp_path / "undisturbed")
    out = tmp_path / "killed"
    words = [sys.executable, "-c", AIMED_KILL, *moment, *flags, "--out", out]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for path in out.glob("*.pt"):
        utils.load_model(path, CPU)
    call("train.py", "--resume", "--data-dir", tiny, "--out", out)
    assert_same_bits(tmp_path / "undisturbed" / "model.pt", out / "model.pt")
    assert sorted(p.name for p in out.iterdir()) == ["last.pt", "model.pt"]


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    utils.write_json(target, 1)
    program = (
        "import os, signal, sys, utils\nfrom pathlib import Path\n"
        "with utils.atomic_write(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(target)], cwd=ROOT).returncode == -signal.SIGKILL
    assert target.read_text() == "1\n" and len(list(tmp_path.iterdir())) == 2
    utils.write_json(target, 2)
    assert target.read_text() == "2\n" and len(list(tmp_path.iterdir())) == 1


def start(*args: object) -> subprocess.Popen:
    """train.py in the background, in a process group of its own, which ends at Ctrl-C even under a job of a shell."""
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, args)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until `process` has written `path`."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_ctrl_c_and_a_second_training_into_the_same_folder(refuse, tiny: Path, tmp_path: Path) -> None:
    process = start("--epochs", 1000, "--data-dir", tiny, "--out", tmp_path)
    wait_for(tmp_path / "last.pt", process)
    refuse("train.py", "--epochs", 1, "--out", tmp_path, words=["another training writes to", tmp_path])
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "go on with --resume" in errors and "Traceback" not in errors
    assert utils.load_checkpoint(tmp_path / "last.pt")["recipe"]["epochs"] == 1000
    with train.locked(tmp_path):  # the lock went with the process
        pass


def test_sigterm_stops_all_of_several_runs_as_ctrl_c_does(tiny: Path, tmp_path: Path) -> None:
    """It reaches the parent alone, which hands it on."""
    process = start("--runs", 3, "--jobs", 2, "--epochs", 1000, "--data-dir", tiny, "--out", tmp_path)
    for seed in (0, 1):
        wait_for(tmp_path / f"seed-{seed}" / "last.pt", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130 and "the same command with --resume goes on" in errors
    for seed in (0, 1):
        utils.load_checkpoint(tmp_path / f"seed-{seed}" / "last.pt")
        assert "Finished epochs are kept" in (tmp_path / f"seed-{seed}" / "log.txt").read_text()
        with train.locked(tmp_path / f"seed-{seed}"):
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
def test_output_that_goes_nowhere(environment: dict, trained: Path) -> None:
    command = [sys.executable, "test_model.py", "--checkpoint", str(trained / "model.pt")]
    with open("/dev/full", "w") as full_disk:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full_disk, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # as `| true` does
    assert "Traceback" not in process.stderr.read() and process.wait() == 1


# --- damaged and hostile checkpoints ---------------------------------------------------------------------------------


class Evil:
    """Unpickled by an unsafe reader, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Huge:
    """A tensor whose pickle declares a terabyte over a few bytes of storage."""

    def __reduce__(self):
        storage = torch.zeros(4).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, 0, (2**38,), (1,), False, {})


class Good(NamedTuple):
    """A checkpoint to make a bad one from: its bytes and its contents, and the file that code in it would create."""

    data: bytes
    contents: dict[str, Any]
    trap: Path

    def with_(self, part: str, **changes: object) -> dict[str, Any]:
        """The contents with some of one part changed."""
        return {**self.contents, part: {**self.contents[part], **changes}}


def zipped(size: int) -> bytes:
    """A zip archive that unpacks to `size` bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(size))
    return buffer.getvalue()


def tarred() -> bytes:
    """A tar archive, as PyTorch's first checkpoints were."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return buffer.getvalue()


BAD: dict[str, Callable[[Good], object]] = {  # the bytes of a file, or what torch.save makes one of
    "text": lambda good: b"hello",
    "pickle": lambda good: pickle.dumps(Evil(good.trap)),
    "half": lambda good: good.data[:40_000],
    "flipped": lambda good: flip(good.data, len(good.data) // 2),
    "bomb": lambda good: zipped(200 * 2**20),
    "tar with a zip behind it": lambda good: tarred() + good.data,
    "list": lambda good: [1, 2],
    "parts missing": lambda good: {"model": good.contents["model"]},
    "code": lambda good: {**good.contents, "metrics": Evil(good.trap)},
    "of before": lambda good: {k: v for k, v in good.contents.items() if k != "history"},
    "empty history": lambda good: {**good.contents, "history": []},
    "history of words": lambda good: {**good.contents, "history": [{**good.contents["history"][0], "seconds": "2"}]},
    "no split": lambda good: good.with_("recipe", val_size="all"),
    "another width": lambda good: good.with_("architecture", width=3),
    "enormous width": lambda good: good.with_("architecture", width=10**9),
    "unknown word": lambda good: good.with_("architecture", depth=3),
    "not finite": lambda good: good.with_("model", **{"fc2.bias": torch.full((10,), float("nan"))}),
    "wrong type": lambda good: good.with_("model", **{"fc2.bias": torch.zeros(10).double()}),
    "no tensor": lambda good: good.with_("model", **{"fc2.bias": [0.0]}),
    "terabyte": lambda good: good.with_("model", **{"fc2.bias": Huge()}),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_checkpoints_are_one_line_and_run_no_code(how: str, refuse, trained: Path, tmp_path: Path) -> None:
    source, path, trap = trained / "model.pt", tmp_path / "bad.pt", tmp_path / "trap"
    bad = BAD[how](Good(source.read_bytes(), torch.load(source, weights_only=True), trap))
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    else:
        torch.save(bad, path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse("test_model.py", "--checkpoint", path, words=[path])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 200_000  # KiB
    assert not trap.exists()


def test_a_missing_checkpoint_is_one_line_that_says_how_to_make_one(refuse, tmp_path: Path) -> None:
    refuse("test_model.py", "--checkpoint", tmp_path / "none.pt", words=[tmp_path / "none.pt", "`python train.py`"])
    refuse("test_model.py", "--checkpoint", tmp_path, words=["cannot read", tmp_path])  # a folder


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """`data` with bits flipped, cut short, with a stretch overwritten, or with something before it."""
    kind, changed = rng.randrange(4), bytearray(data)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 8, 64])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 2:
        at = rng.randrange(len(changed))
        changed[at : at + 400] = rng.randbytes(min(400, len(changed) - at))
    else:
        changed = bytearray(rng.randbytes(rng.randrange(1, 5000))) + changed
    return bytes(changed)


def test_corrupted_checkpoints_are_refused_or_harmless(trained: Path, tmp_path: Path) -> None:
    """A bit flipped in the archive's padding changes nothing; anything else is one line."""
    source, path, rng, refusals = trained / "model.pt", tmp_path / "bad.pt", random.Random(0), 0
    good = utils.load_checkpoint(source)["model"]
    for _ in range(150):
        path.write_bytes(corrupt(source.read_bytes(), rng))
        try:
            model, _ = utils.load_model(path, CPU)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refusals += 1
        else:
            assert all(torch.equal(good[name], tensor) for name, tensor in model.state_dict().items())
    assert refusals > 100


def spoil(node: Any, rng: random.Random) -> None:
    """Replace or remove one value, at random, in the nested dictionaries and lists of `node`."""
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.9:
        spoil(node[key], rng)
    elif rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice([
            None, "text", "", -1, 10**30, 0.5, float("nan"), True, [], [[]], {}, {"a": 1}, torch.zeros(3),
            torch.ones(2, 2).int(), torch.full((10,), float("inf")), Huge(),
        ])  # fmt: skip


def test_spoilt_training_states_are_refused_or_harmless(
    trained: Path, environment: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume of a finished run with one value spoilt: one line and nothing changed, or the same bits."""
    last, rng, refusals = tmp_path / "last.pt", random.Random(0), 0
    finished = torch.load(trained / "last.pt", weights_only=True)
    for _ in range(60):
        checkpoint = copy.deepcopy(finished)
        spoil(checkpoint, rng)
        torch.save(checkpoint, last)
        before = last.read_bytes()
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(tmp_path)])
        monkeypatch.setenv("MNIST_DATA_DIR", environment["MNIST_DATA_DIR"])
        try:
            MAINS["train.py"]()
        except UserError as error:
            assert "\n" not in str(error)
            assert last.read_bytes() == before
            refusals += 1
        else:
            weights = utils.load_checkpoint(tmp_path / "model.pt")["model"]["fc1.weight"]
            assert torch.equal(weights, finished["model"]["fc1.weight"])
    assert refusals > 30


def test_other_training_images_are_not_resumed_with(refuse, trained: Path, data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "out")
    shutil.copytree(data_dir, tmp_path / "data")
    images = next((tmp_path / "data").glob("train-images*"))
    images.write_bytes(images.read_bytes()[:-1] + b"\x07")
    flags = ("--resume", "--data-dir", tmp_path / "data", "--out", tmp_path / "out")
    refuse("train.py", *flags, words=["trained on other images", "last.pt"])
