"""Nothing lost, nothing let in: kills, full disks, two trainings at once, damaged and hostile files.

Fast versions run always; `pytest --full` runs the long ones.
"""

from __future__ import annotations

import copy
import gzip
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_refused, at_most_megabytes
from test_scripts import Evil, assert_same_bits, wait_for

import utils
from utils import UserError

CPU = torch.device("cpu")


# --- kill -9 ---------------------------------------------------------------------------------------------------------


KILLED = ("--epochs", 3, "--batch-size", 16, "--dropout-until", 0.5)
# train.py that kills itself "before" or "after" the n-th call of one function; argv: name, moment, n, train.py's flags.
AIMED_KILL = """
import os, signal, sys
import train, utils

name, moment, left = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
owner = {"_step": train.Step, "replace": os, "predict": utils}[name]
original = getattr(owner, name)

def aimed(*args, **kwargs):
    global left
    left -= 1
    if left == 0 and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, aimed)
utils.run_script(train.main)
"""
# Each epoch replaces last.pt, then history.json; the run's end reads the test set and replaces model.pt.
MOMENTS = [
    ("_step", "before", 1), ("_step", "after", 60), ("replace", "before", 1), ("replace", "after", 1),
    ("replace", "after", 2), ("_step", "after", 125), ("replace", "before", 5), ("replace", "before", 6),
    ("predict", "before", 1), ("predict", "after", 1), ("replace", "before", 7), ("replace", "after", 7),
]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nobody kills."""
    out = tmp_path_factory.mktemp("undisturbed")
    run("train.py", *KILLED, "--out", out)
    return out


def assert_whole(out: Path) -> None:
    """What a killed training has left in `out` can be read."""
    for path in out.glob("*.pt"):
        utils.load_model(path, CPU)


def test_kill_at_each_kind_of_moment_then_resume(run, undisturbed: Path, environment, tmp_path: Path, full) -> None:
    """In a step, before and after each file takes its name, in the final evaluation: --resume ends in the same bits."""
    for moment in MOMENTS if full else [("replace", "after", 3), ("predict", "before", 1)]:
        out = tmp_path / "-".join(map(str, moment))
        done = subprocess.run(
            [sys.executable, "-c", AIMED_KILL, *map(str, [*moment, *KILLED, "--out", out])], cwd=ROOT,
            env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert_whole(out)
        recipe = () if (out / "last.pt").exists() else KILLED  # which the checkpoint carries
        run("train.py", *recipe, "--resume", "--out", out)
        assert_same_bits(undisturbed / "model.pt", out / "model.pt")
        assert sorted(p.name for p in out.iterdir()) == ["history.json", "last.pt", "model.pt"]


def test_kill_at_random_moments_then_resume(run, start, undisturbed: Path, tmp_path: Path, full: bool) -> None:
    """Wherever kill -9 strikes, last.pt is whole or absent, and --resume ends in the same bits."""
    if not full:
        pytest.skip("50 kills: pytest --full")
    began = time.monotonic()
    run("train.py", *KILLED, "--out", tmp_path / "timed")
    duration = time.monotonic() - began
    rng, out, killed = random.Random(0), tmp_path / "killed", 0
    while killed < 50:
        shutil.rmtree(out, ignore_errors=True)
        for attempt in range(1, 100):  # each resumes the one before and is killed in its turn, until one ends in peace
            process = start(*KILLED, "--resume", "--out", out)
            try:  # the first 0.4 are imports; a machine that has become slower gets more time with each attempt
                process.wait(rng.uniform(0.4, 0.9 + attempt / 20) * duration)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
            _, errors = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), errors
            assert_whole(out)
            if process.returncode == 0:
                break
        assert_same_bits(undisturbed / "model.pt", out / "model.pt")
        assert sorted(p.name for p in out.iterdir()) == ["history.json", "last.pt", "model.pt"]


def test_kill_while_a_file_is_written(tmp_path: Path) -> None:
    """What the killed process had begun is not what is read, and the next write takes its place."""
    target = tmp_path / "model.pt"
    utils.save_checkpoint(target, {"good": 1})
    program = (
        "import os, signal, sys, utils\nfrom pathlib import Path\n"
        "with utils.replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(target)], cwd=ROOT).returncode == -signal.SIGKILL
    assert torch.load(target, weights_only=True) == {"good": 1}
    assert len(list(tmp_path.iterdir())) == 2
    utils.save_checkpoint(target, {"good": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


# --- places that cannot be written -----------------------------------------------------------------------------------


def test_full_disk_keeps_the_checkpoint(environment, trained: Path, tmp_path: Path) -> None:
    """A file-size limit breaks the write half way, as a full disk does."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = subprocess.run(
        [sys.executable, "train.py", "--epochs", "1", "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
        env=environment, timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "last.pt" in done.stderr.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_out_that_cannot_be_a_folder(run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert_refused(run("train.py", "--epochs", 1, "--out", out, status=2), "cannot write", out)
    place = tmp_path / "file" / "r.json"
    done = run("test_model.py", "--checkpoint", trained / "model.pt", "--json", place, status=2)
    assert "cannot write" in done.stderr and str(place) in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_out(run, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    out.chmod(0o500)
    try:
        done = run("train.py", "--epochs", 1, "--out", out, status=2)
        assert "cannot write" in done.stderr
        utils.load_model(out / "model.pt", CPU)
    finally:
        out.chmod(0o700)


def test_vanished_data_folder(run, trained: Path, tmp_path: Path) -> None:
    offline = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    flags = ("--checkpoint", trained / "model.pt", "--data-dir", tmp_path / "gone")
    done = run("test_model.py", *flags, env=offline, status=2)
    assert "missing train-images-idx3-ubyte" in done.stderr.splitlines()[-1]


def test_second_training_into_one_folder_is_refused(run, start, tmp_path: Path) -> None:
    first = start("--epochs", 1000, "--out", tmp_path / "seed-1")
    wait_for(tmp_path / "seed-1" / "last.pt", first)
    refused = run("train.py", "--epochs", 1, "--out", tmp_path / "seed-1", status=2)
    assert_refused(refused, "another training writes to", tmp_path)
    refused = run("train.py", "--epochs", 1, "--runs", 2, "--seed", 1, "--out", tmp_path, status=2)
    assert "another training writes to" in refused.stderr.splitlines()[-1]
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert utils.load_checkpoint(tmp_path / "seed-1" / "last.pt")["recipe"]["epochs"] == 1000
    with utils.locked(tmp_path / "seed-1"):  # the lock went with the process
        pass


# --- damaged and hostile checkpoints ---------------------------------------------------------------------------------


class Huge:
    """A tensor whose pickle declares a terabyte over a few bytes of storage."""

    def __reduce__(self):
        storage = torch.zeros(4).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return (torch._utils._rebuild_tensor_v2, (typed, 0, (2**38,), (1,), False, {}))


def hostile(good: dict[str, Any], rng: random.Random, trap: Path) -> dict[str, Any]:
    """The contents of a checkpoint with one thing wrong, as somebody might craft it."""
    weights = dict(good["model"])
    name = rng.choice([n for n in weights if weights[n].is_floating_point()])
    bad = {**good, "model": weights}
    kind = rng.randrange(9)
    if kind == 0:
        weights[name] = torch.full_like(weights[name], rng.choice([float("nan"), float("inf")]))
    elif kind == 1:
        weights[name] = torch.zeros(rng.randrange(1, 9), 17)
    elif kind == 2:
        weights[name] = weights[name].to(rng.choice([torch.float64, torch.int32, torch.complex64]))
    elif kind == 3:
        weights[name] = rng.choice([None, "text", [1.0], {}])
    elif kind == 4:
        del weights[name]
    elif kind == 5:
        bad[rng.choice(list(utils.CONTENTS))] = rng.choice([None, 1.5, "text", [3]])
    elif kind == 6:
        bad["architecture"] = rng.choice([{}, {"width": 10**9}, {"width": "1"}, {"depth": 3}, {"width": -1}])
    elif kind == 7:
        weights[name] = Huge()
    else:
        bad["metrics"] = {"x": Evil(trap)}
    return bad


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


def same_contents(a: Any, b: Any) -> bool:
    """Equality of checkpoints, tensors by their bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_contents(a[k], b[k]) for k in a)
    return a == b


def test_corrupted_checkpoints(trained: Path, tmp_path: Path, full: bool) -> None:
    """Each is refused in one line, fast and in bounded memory, or holds what it held: the bit flipped was padding."""
    source, path, trap = trained / "model.pt", tmp_path / "bad.pt", tmp_path / "trap"
    good, data, rng = utils.load_checkpoint(source), source.read_bytes(), random.Random(0)
    refusals = 0
    with at_most_megabytes(300):
        for i in range(1000 if full else 90):
            crafted = i % 3 == 0
            if crafted:
                torch.save(hostile(good, rng, trap), path)
            else:
                path.write_bytes(corrupt(data, rng))
            start = time.monotonic()
            try:
                _, checkpoint = utils.load_model(path, CPU)
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                refusals += 1
            else:
                assert not crafted and same_contents(checkpoint, good), i
            assert time.monotonic() - start < 5
    assert refusals > 0.8 * (i + 1)
    assert not trap.exists()


def test_zip_bomb_and_endless_entries(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 * 2**20))
    assert path.stat().st_size < 2**20
    with at_most_megabytes(50), pytest.raises(UserError, match="compressed or oversized"):
        utils.load_checkpoint(path)


def test_damaged_training_state_is_not_resumed(
    run, trained: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    checkpoint = utils.load_checkpoint(trained / "last.pt")
    training = checkpoint["training"]
    broken: list[dict[str, Any]] = [
        {**training, "weights": {**training["weights"], "fc2.bias": torch.full((10,), float("nan"))}},
        {**training, "optimizer": {}},
        {**training, "optimizer": {**training["optimizer"], "state": {}}},
        {**training, "history": []},
        {**training, "ema": {**training["ema"], "module.fc2.bias": torch.full((10,), float("inf"))}},
    ]
    crafted = [{**checkpoint, "training": state} for state in broken]
    crafted.append({**checkpoint, "recipe": {**checkpoint["recipe"], "width": 10**6}})
    crafted.append({**checkpoint, "recipe": {**checkpoint["recipe"], "activation": "foo"}})
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--data-dir", str(data_dir), "--out", str(tmp_path)])
    for contents in crafted:
        torch.save(contents, tmp_path / "last.pt")
        before = (tmp_path / "last.pt").read_bytes()
        with pytest.raises(UserError, match="cannot be resumed"):
            train.main()
        assert (tmp_path / "last.pt").read_bytes() == before
    done = run("train.py", "--resume", "--out", tmp_path, status=2)
    assert "cannot be resumed" in done.stderr.splitlines()[-1]


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
    trained: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """--resume of a last.pt with one value spoilt: refused and nothing changed, or the same bits; never a crash."""
    import train

    last, rng, refusals = tmp_path / "last.pt", random.Random(0), 0
    unfinished = torch.load(trained / "last.pt", weights_only=True)
    unfinished["recipe"]["epochs"] += 1
    torch.save(unfinished, last)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--data-dir", str(data_dir), "--out", str(tmp_path)])
    train.main()
    expected = (tmp_path / "model.pt").rename(tmp_path / "expected.pt")
    for i in range(1000 if full else 60):
        checkpoint = copy.deepcopy(unfinished)
        spoil(checkpoint, rng)
        torch.save(checkpoint, last)
        before, began = last.read_bytes(), time.monotonic()
        try:
            train.main()
        except (UserError, SystemExit) as error:  # the latter is argparse's, of a recipe that is out of range
            assert error.code == 2 if isinstance(error, SystemExit) else "\n" not in str(error), i
            assert last.read_bytes() == before and time.monotonic() - began < 5, i
            refusals += 1
        else:
            if checkpoint["recipe"] == unfinished["recipe"]:
                assert_same_bits(expected, tmp_path / "model.pt")
    assert refusals > 0.5 * (i + 1)


def test_a_file_that_changed_since_the_stop_is_not_resumed_with(
    run, data_dir: Path, trained: Path, tmp_path: Path
) -> None:
    """Other data or another teacher would not give the bits of the undisturbed run."""
    teacher, out = tmp_path / "teacher.pt", tmp_path / "out"
    shutil.copy(trained / "model.pt", teacher)
    shutil.copytree(data_dir / "MNIST", tmp_path / "MNIST")
    flags = ("--data-dir", tmp_path, "--out", out, "--resume")
    run("train.py", "--epochs", 1, "--dropout-until", 0, "--teacher", teacher, *flags)
    before = (out / "last.pt").read_bytes()
    shutil.copy(trained / "last.pt", teacher)
    assert "teacher.pt has changed since" in run("train.py", *flags, status=2).stderr
    shutil.copy(trained / "model.pt", teacher)
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    original = labels.read_bytes()
    labels.write_bytes(original[:-1] + bytes([(original[-1] + 1) % 10]))
    assert "train-labels-idx1-ubyte has changed since" in run("train.py", *flags, status=2).stderr
    assert (out / "last.pt").read_bytes() == before


# --- damaged IDX files -----------------------------------------------------------------------------------------------


def break_idx(data: bytes, dims: int, rng: random.Random) -> bytes:
    """An IDX file that contradicts the format: a header field, its length, or nothing like it at all."""
    changed, kind = bytearray(data), rng.randrange(4)
    if kind == 0:
        at = rng.randrange(4 + 4 * dims)
        changed[at] ^= rng.randrange(1, 256)
    elif kind == 1:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 2:
        changed += rng.randbytes(rng.randrange(1, 1000))
    else:
        changed = bytearray(rng.randbytes(rng.randrange(0, 3000)))
    return bytes(changed)


def test_corrupted_data_files(data_dir: Path, tmp_path: Path, full: bool) -> None:
    shutil.copytree(data_dir / "MNIST", tmp_path / "MNIST")
    raw, rng = tmp_path / "MNIST" / "raw", random.Random(0)
    original = {name: (raw / name).read_bytes() for name in utils.MNIST_FILES}
    with at_most_megabytes(300):
        for _ in range(1000 if full else 90):
            name = rng.choice(list(original))
            data = break_idx(original[name], utils.MNIST_FILES[name][1], rng)
            packed = rng.random() < 0.4
            if packed:
                data = gzip.compress(data, 1)
                if rng.random() < 0.5:
                    data = corrupt(data, rng)
                (raw / name).unlink()
            (raw / (f"{name}.gz" if packed else name)).write_bytes(data)
            start = time.monotonic()
            with pytest.raises(UserError) as refused:
                utils.prepare_mnist(tmp_path)
            assert "\n" not in str(refused.value) and time.monotonic() - start < 5
            (raw / f"{name}.gz").unlink(missing_ok=True)
            (raw / name).write_bytes(original[name])
            assert sorted(p.name for p in raw.iterdir()) == sorted(original)


def test_gzip_bomb_stops_at_the_declared_size(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir / "MNIST", tmp_path / "MNIST")
    name = "t10k-images-idx3-ubyte"
    path = tmp_path / "MNIST" / "raw" / name
    header = path.read_bytes()[:16]
    path.unlink()
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(header + bytes(200 * 2**20))
    path.with_name(f"{name}.gz").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="declares"):
        utils.prepare_mnist(tmp_path)
    assert not path.exists() and not list(path.parent.glob(".*"))


# --- bits and threads ------------------------------------------------------------------------------------------------


def test_resume_keeps_the_number_of_threads(run, tmp_path: Path) -> None:
    """The bits depend on it, so the checkpoint carries it and --resume refuses another."""
    run("train.py", "--epochs", 1, "--threads", 1, "--dropout-until", 0, "--out", tmp_path)
    assert utils.load_checkpoint(tmp_path / "last.pt")["training"]["threads"] == 1
    run("train.py", "--resume", "--out", tmp_path)
    refused = run("train.py", "--resume", "--threads", 2, "--out", tmp_path, status=2)
    assert "--threads 2" in refused.stderr
