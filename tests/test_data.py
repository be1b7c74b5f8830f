"""Data files, batches, augmentation, held-out images."""

from __future__ import annotations

import gzip
import hashlib
import tracemalloc
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from conftest import CPU, ROOT, flip, idx, mnist, write_mnist
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

import utils
from model import Net
from utils import Augmentation, Loader, Split, UserError

NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_repository_carries_the_official_archives() -> None:
    readme = (ROOT / "data" / "README.md").read_text()
    for name, md5 in MNIST.resources:
        assert hashlib.md5((ROOT / "data/MNIST/raw" / name).read_bytes()).hexdigest() == md5
        assert f"| `{name}` | `{md5}` |" in readme
    assert len(mnist(train=True).labels) == 60_000


def test_images_and_labels_are_torchvisions(tmp_path: Path) -> None:
    for name, _ in MNIST.resources:  # torchvision unpacks beside: not in the repository's own folder
        packed = ROOT / "data/MNIST/raw" / name
        (tmp_path / "MNIST/raw").mkdir(parents=True, exist_ok=True)
        (tmp_path / "MNIST/raw" / name[:-3]).write_bytes(gzip.decompress(packed.read_bytes()))
    theirs, ours = MNIST(str(tmp_path), train=False), utils.load_mnist(tmp_path, train=False, device=CPU)
    assert torch.equal(ours.images[:, 0], theirs.data) and torch.equal(ours.labels, theirs.targets)


@pytest.mark.parametrize("layout", ["MNIST/raw", ".", "FashionMNIST/raw", "raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_files_are_found_packed_or_not_in_each_layout(layout: str, packed: bool, tmp_path: Path) -> None:
    write_mnist(tmp_path / layout, train=50, test=20)
    if packed:
        for name in NAMES:
            raw = tmp_path / layout / name
            raw.with_name(f"{name}.gz").write_bytes(gzip.compress(raw.read_bytes()))
            raw.unlink()
    before = sorted(tmp_path.rglob("*"))
    split = utils.load_mnist(tmp_path, train=False, device=CPU)
    assert split.images.shape == (20, 1, 28, 28) and split.labels.tolist()[:3] == [7, 2, 1]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


IMAGES, LABELS = NAMES[2:]
PACKED = f"{IMAGES}.gz"
DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {  # the file, what becomes of it, words of the message
    "truncated": (IMAGES, lambda data: data[:-1], "truncated"),
    "too long": (IMAGES, lambda data: data + b"x", "too long"),
    "empty": (IMAGES, lambda data: b"", "damaged"),
    "not IDX": (IMAGES, lambda data: b"<html>404</html>", "not an IDX file"),
    "enormous": (IMAGES, lambda data: bytes([0, 0, 8, 3]) + 12 * b"\xff", "declares"),
    "not square": (IMAGES, lambda data: idx(np.zeros((20, 28, 20))), "20 x 28 x 20"),
    "32x32": (IMAGES, lambda data: idx(np.zeros((20, 32, 32))), "IMAGE_SIZE = 32 in model.py"),
    "label 10": (LABELS, lambda data: idx(np.full(20, 10)), "CLASSES = 11 in model.py"),
    "other number": (LABELS, lambda data: idx(np.zeros(19)), "19 labels"),
    "gzip cut": (PACKED, lambda data: gzip.compress(data)[:2000], PACKED),
    "gzip sum": (PACKED, lambda data: flip(gzip.compress(data), -5), PACKED),
    "gzip flipped": (PACKED, lambda data: flip(gzip.compress(data), 2000), PACKED),
    "missing": ("other", lambda data: data, f"no {IMAGES}"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_one_line_that_names_the_file(how: str, refuse, tmp_path: Path) -> None:
    name, damage, words = DAMAGES[how]
    good = write_mnist(tmp_path, train=50, test=20) / (LABELS if name == LABELS else IMAGES)
    data = good.read_bytes()
    good.unlink()
    (tmp_path / name).write_bytes(damage(data))
    refuse("train.py", "--data-dir", tmp_path, "--out", tmp_path / "out", words=[words, tmp_path])


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / PACKED
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 28, 0, 0, 0, 28]))
        for _ in range(200):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match="too long"):
        utils.read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_an_empty_folder_is_filled_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: Path, download: bool) -> None:
        assert download
        write_mnist(Path(root) / "MNIST" / "raw", train=50, test=20)

    monkeypatch.setattr("torchvision.datasets.MNIST", download)
    assert len(utils.load_mnist(tmp_path / "new", train=True, device=CPU).labels) == 50

    def fail(root: Path, download: bool) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried ...")

    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    with pytest.raises(UserError, match=r"Error downloading train-images-idx3-ubyte.gz:\); leave out --data-dir"):
        utils.load_mnist(tmp_path / "newer", train=True, device=CPU)


def test_a_folder_with_other_files_is_left_alone(refuse, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    refuse("train.py", "--data-dir", tmp_path, "--out", tmp_path / "out", words=[NAMES[0], tmp_path])
    assert (tmp_path / "thesis.tex").read_text() == "..."


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(test_split: Split) -> Split:
    """230 digits, 23 of each class."""
    index = torch.cat([(test_split.labels == digit).nonzero()[:23, 0] for digit in range(10)])
    return test_split.select(index)


def test_two_other_data_sets_in_one_folder_are_one_line(refuse, tmp_path: Path) -> None:
    for name in ("EMNIST", "KMNIST"):
        write_mnist(tmp_path / name / "raw", train=50, test=20)
    refuse("train.py", "--data-dir", tmp_path, "--out", tmp_path / "out", words=["several data sets", "EMNIST/raw"])
    write_mnist(tmp_path / "MNIST/raw", train=30, test=20)
    assert len(utils.load_mnist(tmp_path, train=True, device=CPU).labels) == 30  # MNIST goes first


@pytest.mark.parametrize(
    "count, size, sizes",
    [(230, 64, [64, 64, 64, 38]), (129, 64, [64, 65]), (65, 64, [65]), (1, 64, [1]), (101, 50, [50, 51])],
)
def test_a_last_batch_of_one_image_joins_the_one_before(split: Split, count: int, size: int, sizes: list[int]) -> None:
    loader = Loader(split.select(slice(count)), size, Augmentation(), seed=0)
    x, y, index = zip(*loader)
    assert len(loader) == len(x)
    assert [*map(len, x)] == [*map(len, y)] == [*map(len, index)] == sizes


def test_shuffled_loader_shows_each_image_once_and_depends_on_seed_and_epoch_only(split: Split) -> None:
    def epoch(seed: int, number: int) -> torch.Tensor:
        loader = Loader(split, 64, Augmentation(), seed)
        loader.set_epoch(number)
        return torch.cat([x for x, _, _ in loader])

    first, images = epoch(0, 3), split.images / 255
    assert not torch.equal(first, images)
    torch.testing.assert_close(first.flatten(1).sum(1).sort().values, images.flatten(1).sum(1).sort().values)
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(first, epoch(0, 3))
    assert not torch.equal(first, epoch(0, 4)) and not torch.equal(first, epoch(1, 3))


def test_after_one_epoch_each_pass_has_the_images_with_the_largest_losses_and_some_others() -> None:
    digits = mnist(train=True).select(slice(3072))
    loader, shown = Loader(digits, 1024, Augmentation(), seed=0), []
    loader.losses[:] = torch.randperm(3072, generator=torch.Generator().manual_seed(0)) + 1.0
    assert sorted(torch.cat([index for _, _, index in loader]).tolist()) == list(range(3072))
    loader.set_epoch(1)
    for _, labels, index in loader:  # three passes of one batch each
        hardest = set(loader.losses.topk(512).indices.tolist())
        others = set(index.tolist()) - hardest
        assert len(others) == 512 and hardest < set(index.tolist())
        assert not others < set(loader.losses.topk(2000).indices.tolist())  # they are any, not the next
        assert torch.equal(labels, digits.labels[index])
        loader.losses[index] = 0.5 * torch.rand(1024)
        shown.append(hardest)
    assert not shown[0] & shown[1] and not shown[1] & shown[2]  # a loss counts from the next pass on


@pytest.mark.parametrize("size", [10, 23, 100, 229])
def test_validation_split_is_stratified_disjoint_and_whole(split: Split, size: int) -> None:
    tagged = Split(torch.arange(230), split.labels)
    rest, held = utils.validation_split(tagged, size)
    assert len(held.labels) == size
    assert sorted(torch.cat([rest.images, held.images]).tolist()) == list(range(230))
    counts = torch.bincount(held.labels, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(utils.validation_split(tagged, size)[1].images, held.images)


def test_the_validation_images_are_those_of_the_published_figures() -> None:
    """Validation figures in README compare only while `--val-size 10000` holds out the same images."""
    _, held = utils.validation_split(Split(torch.arange(60_000), mnist(train=True).labels), 10_000)
    assert held.images[:5].tolist() == [2, 7, 9, 11, 13] and int(held.images.sum()) == 300_517_329


def test_folds_are_stratified_and_cover_everything_once(split: Split) -> None:
    tagged = Split(torch.arange(230), split.labels)
    folds = [utils.fold_split(tagged, 4, fold) for fold in (1, 2, 3, 4)]
    assert torch.cat([held.images for _, held in folds]).sort().values.tolist() == list(range(230))
    for rest, held in folds:
        assert sorted(torch.cat([rest.images, held.images]).tolist()) == list(range(230))
        counts = torch.bincount(held.labels, minlength=10)
        assert counts.min() >= 5 and counts.max() <= 6  # 23 of each digit


def test_predict_and_accuracy(test_split: Split) -> None:
    """The network's input is what torchvision's ToTensor makes of a picture: here 600 pictures, two batches."""
    model, images = Net(), test_split.images[:600]
    logits = utils.predict(model.train(), images)
    x = torch.stack([ToTensor()(image.numpy()) for image in images[:, 0]])
    torch.testing.assert_close(logits, model.eval()(x).detach(), atol=1e-5, rtol=1e-5)
    assert utils.accuracy(torch.eye(10)[[1, 2, 3, 4]], torch.tensor([1, 2, 3, 0])) == 75.0


# --- augmentation ----------------------------------------------------------------------------------------------------

STILL = torch.zeros(16, 2, utils.ELASTIC_GRID**2)


@pytest.mark.parametrize("seed", range(4))
def test_warp_is_torchvisions_affine(seed: int) -> None:
    """Image by image, for random angle, translation, scale and both shears together."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(16, 1, 28, 28, generator=g)
    u = torch.rand(16, 6, generator=g) * 2 - 1
    angle, translate, scale, shear = 25 * u[:, 0], 5 * u[:, 1:3], 1 + 0.3 * u[:, 3], 15 * u[:, 4:6]
    matrices = utils.affine_matrices(angle, translate, scale, shear)
    ours = utils.warp(images, matrices, STILL, utils.grid_basis(CPU))
    for i in range(16):
        arguments = angle[i].item(), translate[i].tolist(), scale[i].item(), shear[i].tolist()
        theirs = TF.affine(images[i], *arguments, interpolation=TF.InterpolationMode.BILINEAR)
        torch.testing.assert_close(ours[i], theirs, atol=2e-4, rtol=0)


def test_warp_grid_is_affine_grid_and_elastic_moves_by_pixels() -> None:
    images, basis = torch.rand(2, 1, 28, 28), utils.grid_basis(CPU)
    matrices = utils.affine_matrices(torch.tensor([9.0, -5.0]), torch.ones(2, 2), torch.ones(2), torch.ones(2, 2))
    grid = F.affine_grid(matrices, [2, 1, 28, 28], align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    torch.testing.assert_close(utils.warp(images, matrices, STILL[:2], basis), expected, atol=1e-5, rtol=0)
    everywhere_one_right = torch.stack([torch.ones(2, 25), torch.zeros(2, 25)], 1)
    moved = utils.warp(images, torch.eye(2, 3).expand(2, -1, -1), everywhere_one_right, basis)
    torch.testing.assert_close(moved[..., :-1], images[..., 1:], atol=1e-4, rtol=0)


def test_augmentation_stays_in_its_ranges_and_fills_them() -> None:
    g = torch.Generator().manual_seed(0)
    matrices, displacements = Augmentation(rotation=10, scale=0.1, translate=0.1, elastic=0.5).sample(5000, g)
    assert displacements.std() == pytest.approx(0.5, abs=0.01)
    linear = matrices[:, :, :2]
    scale = 1 / torch.linalg.det(linear).sqrt()
    angle = torch.rad2deg(torch.atan2(linear[:, 0, 1], linear[:, 0, 0]))
    offset = (torch.linalg.inv(linear) @ matrices[:, :, 2:]).squeeze(2) / 2  # fraction of the side
    for values, low, high in ((scale, 0.9, 1.1), (angle, -10, 10), (offset, -0.1, 0.1)):
        span = high - low
        assert low - 1e-3 * span <= values.min() < low + 0.02 * span
        assert high - 0.02 * span < values.max() <= high + 1e-3 * span


def test_each_image_is_augmented_for_itself_and_by_the_generator_alone() -> None:
    same = mnist(train=True).images[:1].expand(50, -1, -1, -1) / 255
    augmentation = Augmentation(rotation=10, scale=0.1, translate=0.1, shear=10, elastic=0.5)
    first, again = (utils.augment(same, augmentation, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == same.shape
    assert len(first.unique(dim=0)) == 50
    torch.testing.assert_close(utils.augment(same, Augmentation(), torch.Generator()), same, atol=1e-4, rtol=0)


# --- the splits of a training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"val_size": 400}, {"folds": 4, "fold": 2}])
def test_splits_of_a_checkpoint_are_those_of_its_training(settings: dict, data_dir: Path) -> None:
    recipe = {"val_size": 0, "folds": 0, "fold": 0, **settings}
    everything = utils.load_mnist(data_dir, train=True, device=CPU)
    checkpoint = {"recipe": recipe, "data_crc": utils.crc32(everything)}
    rest, held_out = utils.make_splits(everything, **recipe)
    for name, expected in (("train", rest), ("val", held_out), ("test", utils.load_mnist(data_dir, False, CPU))):
        found = utils.load_split(name, data_dir, checkpoint, CPU)
        assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("script", ["test_model.py", "visualize_errors.py"])
def test_split_that_cannot_be_had_is_one_line(script: str, refuse, trained: Path, tiny: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", trained / "model.pt", "--split", "val")
    refuse(script, *flags, "--data-dir", tiny, words=["--split val", "other images than this checkpoint"])
    checkpoint = utils.load_checkpoint(trained / "model.pt")
    checkpoint["recipe"]["val_size"] = 0
    torch.save(checkpoint, tmp_path / "model.pt")
    refuse(script, "--checkpoint", tmp_path / "model.pt", "--split", "val", words=["held out no images", "--val-size"])
