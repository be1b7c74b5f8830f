"""Fixtures: a few thousand of MNIST's digits, short trainings, two ways to run the scripts."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Callable

# Before torch is imported: two threads that find one core free take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import test_model
import train
import utils
import visualize_errors

ROOT = Path(__file__).resolve().parent.parent
RELEASED = ROOT / "assets" / "mnist_cnn.pt"
HANDWRITING = ROOT / "assets" / "handwriting.pt"
CPU = torch.device("cpu")
MAINS = {
    "train.py": train.main,
    "test_model.py": test_model.main,
    "visualize_errors.py": visualize_errors.main,
}


@functools.lru_cache
def mnist(*, train: bool) -> utils.Split:  # by name only, for the cache
    """The repository's own MNIST; not to be changed in place."""
    return utils.load_mnist(ROOT / "data", train, CPU)


def idx(values: np.ndarray) -> bytes:
    """Uint8 `values` as the contents of an IDX file (LeCun's MNIST page)."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def flip(data: bytes, at: int) -> bytes:
    """`data` with one bit of byte `at` changed."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def write_mnist(folder: Path, train: int, test: int) -> Path:
    """The first `train` and `test` digits of MNIST, in a folder for --data-dir."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        split = mnist(train=part == "train")
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(split.images[:count, 0].numpy()))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(split.labels[:count].numpy()))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 training and 1,000 test digits."""
    return write_mnist(tmp_path_factory.mktemp("data"), train=4000, test=1000)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 training digits: ten steps."""
    return write_mnist(tmp_path_factory.mktemp("tiny"), train=640, test=50)


@pytest.fixture(scope="session")
def test_split() -> utils.Split:
    """The same 1,000 test digits."""
    return mnist(train=False).select(slice(1000))


@pytest.fixture(scope="session")
def environment(data_dir: Path) -> dict[str, str]:
    """The environment of the scripts that tests run."""
    ours = {"MNIST_DATA_DIR": str(data_dir), "MPLBACKEND": "", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **ours}


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """run("train.py", "--epochs", 1, status=0): the script as a user runs it, on `data_dir`."""

    def run(script: str, *args: object, status: int = 0, cwd: Path = ROOT, **env: str):
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)],
            cwd=cwd, env={**environment, **env}, capture_output=True, text=True, timeout=300,
        )
        assert done.returncode == status, f"{done.args}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def call(environment: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """call("train.py", "--epochs", 1, status=0): stdout and stderr of the same in this process."""
    monkeypatch.setenv("MNIST_DATA_DIR", environment["MNIST_DATA_DIR"])

    def call(script: str, *args: object, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), "--device", "cpu", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # which would be lines on stderr
            utils.run_script(MAINS[script])
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == status, f"exit {stop.value.code}\n{out}\n{err}"
        return out, err

    return call


@pytest.fixture
def refuse(call: Callable[..., tuple[str, str]]) -> Callable[..., None]:
    """refuse("train.py", "--epochs", 0, words=["--epochs"]): status 2, one line with the words."""

    def refuse(script: str, *args: object, words: list[object]) -> None:
        _, err = call(script, *args, status=2)
        assert len(err.strip().splitlines()) == 1 and "x1b" not in repr(err), err  # without colours
        assert all(str(word) in err for word in words), err

    return refuse


def our_modules() -> list[str]:
    """The imported modules that `edit` replaces."""
    ours = ("model", "utils", "train", "test_model", "visualize_errors", "extras")
    return [name for name in sys.modules if name.split(".")[0] in ours]


@pytest.fixture
def edit(call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """edit("model.py", text): from now on, `call` runs a copy of the scripts with that text."""

    def edit(file: str, text: str) -> None:
        for script in ("model.py", "utils.py", *MAINS):
            shutil.copy(ROOT / script, tmp_path)
        for folder in ("assets", "extras"):
            (tmp_path / folder).symlink_to(ROOT / folder)
        (tmp_path / file).write_text(text, encoding="utf-8")
        for name in our_modules():
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        for script in MAINS:
            module = importlib.import_module(script[:-3])
            monkeypatch.setitem(MAINS, script, module.main)
        monkeypatch.setitem(globals(), "utils", sys.modules["utils"])

    yield edit
    for name in our_modules():
        del sys.modules[name]


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, then the GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short finished training."""
    out = tmp_path_factory.mktemp("trained")
    flags = ["--epochs", "3", "--val-size", "400", "--dropout-until", "0", "--device", "cpu"]
    train.main([*flags, "--data-dir", str(data_dir), "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def unfinished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of three epochs on `tiny` that was stopped after two."""
    out = tmp_path_factory.mktemp("unfinished")
    print_epoch = train.print_epoch

    def stop(entry: dict) -> None:
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    train.print_epoch = stop
    assert train.main(["--epochs", "3", "--data-dir", str(tiny), "--out", str(out)]) == 130
    train.print_epoch = print_epoch
    return out
