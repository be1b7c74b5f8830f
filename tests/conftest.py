"""Fixtures: a small rendered data set, a training on it, and a way to run the scripts as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest
from synthetic_mnist import make_dataset

# Before anybody imports torch: two threads that find only one core free wait for each other, ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the long versions of the fault-injection tests")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the long versions were asked for."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 training and 500 test images of printed digits, in MNIST's format."""
    return make_dataset(tmp_path_factory.mktemp("data"), train=2000, test=500)


@pytest.fixture(scope="session")
def environment(data_dir: Path) -> dict[str, str]:
    """The environment of the scripts that tests run."""
    return {**os.environ, "MNIST_DATA_DIR": str(data_dir), "MPLBACKEND": ""}


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """run("train.py", "--epochs", 1, status=0): the script in the repository's root, on `data_dir`."""

    def run(script: str, *args: object, status: int = 0, env: dict[str, str] | None = None, timeout: float = 600):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, **(env or {})}, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == status, f"{command}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen]]:
    """start("--epochs", 1): train.py in the background, in a process group of its own that ends with the test."""
    processes = []

    def start(*args: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "train.py", *map(str, args)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="session")
def trained(run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short finished training: model.pt, last.pt, history.json."""
    out = tmp_path_factory.mktemp("trained")
    run("train.py", "--epochs", 3, "--val-size", 200, "--warmup", 0.3, "--dropout-until", 0, "--out", out)
    return out


@pytest.fixture(scope="session")
def released() -> Path:
    """The checkpoint that comes with the repository."""
    return ROOT / "assets" / "mnist_cnn.pt"


@contextmanager
def at_most_megabytes(limit: int) -> Iterator[None]:
    """Fail if this process's memory grows by more than `limit` MiB within; not measured where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        yield
        return

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(field))) // 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before <= limit


def assert_refused(done: subprocess.CompletedProcess, *words: object) -> None:
    """One line on stderr, naming `words`."""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr
