"""Data files, batches, augmentation, held-out images."""

import gzip
import hashlib
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from conftest import CPU, ROOT, flip, idx, mnist, write_mnist
from torch.testing import assert_close
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

import utils
from model import Net
from train import parse_args
from utils import Loader, Split

RECIPE = parse_args([])[1]
STILL = dict.fromkeys(("rotation", "scale", "translate", "shear", "elastic"), 0)
NO_SPLITS = {"train_size": 0, "val_size": 0, "folds": 0, "fold": 0}

KINDS = ("images-idx3", "labels-idx1")
NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in KINDS]


def test_the_repository_carries_the_official_archives():
    readme = (ROOT / "data" / "README.md").read_text()
    for name, md5 in MNIST.resources:
        assert hashlib.md5((ROOT / "data/MNIST/raw" / name).read_bytes()).hexdigest() == md5
        assert f"| `{name}` | `{md5}` |" in readme


@pytest.mark.parametrize("layout", ["MNIST/raw", ".", "FashionMNIST/raw", "raw"])
@pytest.mark.parametrize("names", ["packed {}.gz", "{}", "{}.gz", "kmnist-{}", "Kaggle"])
def test_files_are_found_packed_or_not_in_each_layout(layout, names, tmp_path):
    """Kaggle has ".idx3", and a folder beside each file."""
    packed, names = "packed" in names, names.replace("packed ", "")
    folder = write_mnist(tmp_path / layout, train=50, test=20)
    for name in NAMES:
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if names == "Kaggle":
            (folder / name).mkdir()
        new = name.replace("-idx", ".idx") if names == "Kaggle" else names.format(name)
        (folder / new).write_bytes(gzip.compress(data) if packed else data)
    before = sorted(tmp_path.rglob("*"))
    split = utils.load_mnist(tmp_path, train=False, device=CPU)
    assert split.images.shape == (20, 1, 28, 28) and split.labels.tolist()[:3] == [7, 2, 1]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


def test_emnist_is_turned(tmp_path):
    digits = mnist(train=True).select(slice(50))
    for kind, values in zip(KINDS, (digits.images[:, 0].mT, digits.labels)):
        (tmp_path / f"emnist-digits-train-{kind}-ubyte").write_bytes(idx(values.numpy()))
    assert torch.equal(utils.load_mnist(tmp_path, True, CPU).images, digits.images)


IMAGES, LABELS = NAMES[2:]
PACKED = f"{IMAGES}.gz"
DAMAGES = {  # the file, what becomes of it, words of the message
    "truncated": (IMAGES, lambda data: data[:-1], "truncated"),
    "too long": (IMAGES, lambda data: data + b"x", "too long"),
    "not IDX": (IMAGES, lambda _: b"<html>404</html>", "not an IDX file"),
    "enormous": (IMAGES, lambda _: bytes([0, 0, 8, 3]) + 12 * b"\xff", "not an IDX file"),
    "32x32": (IMAGES, lambda _: idx(np.zeros((9, 32, 32))), "model.py: IMAGE_SIZE = 28"),
    "int32": (IMAGES, lambda data: data[:2] + b"\x0c" + data[3:], "of type 0x0c, not 0x08 (uint8)"),
    "label 10": (LABELS, lambda _: idx(np.full(20, 10)), "to 10; model.py: CLASS_NAMES has 10"),
    "other number": (LABELS, lambda _: idx(np.zeros(19)), "shape (19,); (20,) is needed"),
    "one-hot": (LABELS, lambda _: idx(np.eye(10)[[0] * 20]), "shape (20, 10); (20,) is needed"),
    "gzip cut": (PACKED, lambda data: gzip.compress(data)[:2000], PACKED),
    "gzip sum": (PACKED, lambda data: flip(gzip.compress(data), -5), PACKED),
    "missing": ("other", lambda data: data, "no file t10k-images-idx3-ubyte in"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_named_in_one_line(how, refuse, tmp_path):
    name, damage, words = DAMAGES[how]
    good = write_mnist(tmp_path, train=50, test=20) / (LABELS if name == LABELS else IMAGES)
    data = good.read_bytes()
    good.unlink()
    (tmp_path / name).write_bytes(damage(data))
    refuse("train.py", "--data-dir", tmp_path, "--out", tmp_path / "out", words=[words, tmp_path])


def test_of_several_data_sets_only_mnist_needs_no_name(refuse, tmp_path):
    for name in ("EMNIST", "KMNIST"):
        write_mnist(tmp_path / name / "raw", train=50, test=20)
    flags = ("--data-dir", tmp_path, "--out", tmp_path / "out")
    refuse("train.py", *flags, words=["several data sets", "EMNIST/raw"])
    write_mnist(tmp_path / "MNIST/raw", train=30, test=20)
    assert len(utils.load_mnist(tmp_path, True, CPU)) == 30


@pytest.fixture
def split(test_split):
    """23 digits of each class."""
    index = torch.cat([(test_split.labels == digit).nonzero()[:23, 0] for digit in range(10)])
    return test_split.select(index)


def make_loader(split, variants=None, **settings):
    """A loader that does not augment."""
    return Loader(split, {**RECIPE, **STILL, **settings}, variants)


def test_without_hard_images_each_is_shown_once_in_an_order_of_seed_and_epoch(split):
    def epoch(seed, number):
        loader = make_loader(split, seed=seed, hard_fraction=0)
        images, _, index = map(torch.cat, zip(*loader.batches(number)))
        assert_close(images, split.images[index] / 255, atol=1e-4, rtol=0)
        return index.tolist()

    first = epoch(0, 3)
    assert first == epoch(0, 3) != sorted(first) == list(range(230))
    assert first not in (epoch(0, 4), epoch(1, 3))


PASSES = {3072: [1024] * 3, 3600: [1216, 1216, 1168], 1000: [320, 320, 360], 100: [64, 36], 1: [1]}


@pytest.mark.parametrize("count, passes", PASSES.items())
def test_each_pass_has_the_images_with_the_largest_losses_and_some_others(count, passes):
    """After the first epoch. All batches but the last are of 64 images."""
    loader = make_loader(mnist(train=True).select(slice(count)))
    shown = [index for _, _, index in loader.batches(0)]
    assert sorted(torch.cat(shown).tolist()) == list(range(count))
    assert [len(index) for index in shown[:-1]] == [64] * (len(loader) - 1)
    loader.losses[:] = torch.randperm(count, generator=torch.Generator().manual_seed(0)) + 1.0
    batches = loader.batches(1)
    for size in passes:
        hardest = set(loader.losses.topk(size // 2).indices.tolist())
        others, seen = set(), 0
        while seen < size:
            _, labels, index = next(batches)
            assert torch.equal(labels, loader.split.labels[index])
            assert len(index) == min(64, size - seen)
            others |= set(index.tolist())
            seen += len(index)
            loader.losses[index] *= 0.001  # it counts from the next pass on
        assert len(others) == size and hardest < others
        others -= hardest
        assert size == passes[-1] or not others < set(range(count)) - set(range(count // 2))
    assert next(batches, None) is None


def test_variants_are_shown_with_their_probability(split):
    probability = torch.tensor([0.0, 0.3, 1.0]).repeat(77)[:230]
    black = torch.zeros_like(split.images)
    shown = torch.zeros(230)
    for seed in range(200):
        loader = make_loader(split, (black, probability), seed=seed)
        images, _, index = map(torch.cat, zip(*loader.batches(0)))
        shown[index] += images.flatten(1).amax(1) < 0.01
    assert (shown[probability == 0] == 0).all() and (shown[probability == 1] == 200).all()
    some = shown[probability == 0.3]
    assert some.mean() == pytest.approx(60, abs=4)
    assert some.min() > 20 and some.max() < 100  # chosen anew for each image


def splits(split, **settings):
    """The Splits of `make_splits`, with the indices in `split` as images."""
    indices = Split(torch.arange(len(split)), split.labels)
    return utils.make_splits(indices, {**NO_SPLITS, **settings})


def spread(part):
    """The count of the most frequent digit less that of the rarest."""
    counts = part.labels.bincount(minlength=10)
    return counts.max() - counts.min()


@pytest.mark.parametrize("settings", [
    {"val_size": 10}, {"val_size": 229}, {"folds": 4, "fold": 1}, {"folds": 4, "fold": 4},
])
def test_held_out_images_are_stratified_and_the_same_each_time(split, settings):
    rest, held = splits(split, **settings)
    assert len(held) == settings.get("val_size", pytest.approx(230 / 4, abs=1))
    assert spread(held) <= 1
    assert sorted(torch.cat([rest.images, held.images]).tolist()) == list(range(230))
    few, same = splits(split, train_size=1, **settings)
    assert torch.equal(same.images, held.images) and few.images in rest.images
    few, nothing = splits(split, train_size=60)
    assert len(few) == len(few.images.unique()) == 60 and spread(few) <= 1 and nothing is None


def test_validation_images_are_those_of_the_published_figures():
    _, held = splits(mnist(train=True), val_size=10_000)
    assert held.images[:5].tolist() == [2, 7, 9, 11, 13] and int(held.images.sum()) == 300_517_329


def test_folds_cover_everything_once(split):
    held = [splits(split, folds=4, fold=fold)[1].images for fold in (1, 2, 3, 4)]
    assert torch.cat(held).sort().values.tolist() == list(range(230))


def test_seeds_of_different_uses_differ():
    uses = (utils.HELD_OUT, utils.DROPOUT, utils.WEIGHTS, utils.VARIANTS, utils.ORDER)
    assert len({utils.derive_seed(*args) for args in product(uses, (0, 1), (0, 1))}) == 20


def test_splits_of_a_checkpoint_are_those_of_its_training(data_dir):
    recipe = {**NO_SPLITS, "train_size": 100, "val_size": 400}
    everything = utils.load_mnist(data_dir, True, CPU)
    checkpoint = {"recipe": recipe, "data_crc": utils.checksum(everything)}
    for name, expected in zip(("train", "val"), utils.make_splits(everything, recipe)):
        found = utils.load_split(name, data_dir, checkpoint, CPU)
        assert utils.checksum(found) == utils.checksum(expected)


def test_split_that_cannot_be_had_is_one_line(refuse, trained, tmp_path):
    flags = ("test_model.py", "--split", "val", "--checkpoint")
    labels = write_mnist(tmp_path, train=4000, test=10) / NAMES[1]
    labels.write_bytes(flip(labels.read_bytes(), -1))  # the split is stratified by label
    words = ["--split val", "other training images or labels than this checkpoint"]
    refuse(*flags, trained, "--data-dir", tmp_path, words=words)
    checkpoint = torch.load(trained / "model.pt")
    checkpoint["recipe"]["val_size"] = 0
    torch.save(checkpoint, tmp_path / "model.pt")
    refuse(*flags, tmp_path, words=["held out no images", "--val-size"])


def test_a_test_set_needs_no_training_images(call, trained, tmp_path):
    write_mnist(tmp_path, train=1, test=50)
    for name in NAMES[:2]:
        (tmp_path / name).unlink()
    out, _ = call("test_model.py", "--checkpoint", trained, "--data-dir", tmp_path)
    assert "errors in 50)" in out


def test_predict_and_measure(test_split):
    """The network's input is what torchvision's ToTensor makes of it; here two batches."""
    model = Net()
    images = test_split.images[:600]
    logits = utils.predict(model.train(), images)
    x = torch.stack([ToTensor()(image.numpy()) for image in images[:, 0]])
    assert_close(logits, model.eval()(x).detach(), atol=1e-5, rtol=1e-5)
    logits = torch.eye(10)[[1, 2, 3, 4]].mul(9).log_softmax(1)
    measured = utils.measure(logits, torch.tensor([1, 2, 3, 0]))
    assert measured["accuracy"] == 0.75
    assert measured["loss"] == pytest.approx(math.log(math.exp(9) + 9) - 9 * 0.75)


def test_nine_looks_by_hand(trained, test_split):
    """Under 99 %: the mean probability of nine places; zeros move in. Others keep their logits."""
    model, _ = utils.load_model(trained / "model.pt", CPU)
    images = test_split.images[:100].roll(4, 3)  # with ink at the edge
    one, nine = utils.predict(model, images), utils.predict(model, images, tta=True)
    sure = one.softmax(1).amax(1) >= 0.99
    assert 10 < sure.sum() < 90
    assert torch.equal(one[sure], nine[sure])
    mean = torch.zeros(100, 10)
    for dx, dy in product((-1, 0, 1), repeat=2):
        moved = F.pad(images, [1] * 4).roll((dy, dx), (2, 3))[..., 1:-1, 1:-1]
        mean += utils.predict(model, moved).softmax(1) / 9
    assert_close(nine.softmax(1)[~sure], mean[~sure], atol=1e-5, rtol=1e-4)
    assert_close(utils.predict(model, images[sure], tta=True), one[sure], atol=1e-4, rtol=1e-4)


def test_warp_is_torchvisions_affine_and_shifts_by_pixels():
    g = torch.Generator().manual_seed(0)
    images = torch.rand(16, 1, 28, 28, generator=g)
    u = torch.rand(16, 6, generator=g) * 2 - 1
    angle, translate, scale, shear = 25 * u[:, 0], 5 * u[:, 1:3], 1 + 0.3 * u[:, 3], 15 * u[:, 4:6]
    matrices = utils.affine_matrices(angle, translate, scale, shear)
    straight = torch.zeros(16, 2, utils.ELASTIC_GRID**2)
    ours = utils.warp(images, matrices, straight, utils.grid_basis(CPU))
    for i in range(16):
        arguments = angle[i].item(), translate[i].tolist(), scale[i].item(), shear[i].tolist()
        theirs = TF.affine(images[i], *arguments, interpolation=TF.InterpolationMode.BILINEAR)
        assert_close(ours[i], theirs, atol=2e-4, rtol=0)
    one_right = torch.stack([torch.ones(16, 25), torch.zeros(16, 25)], 1)
    moved = utils.warp(images, torch.eye(2, 3).expand(16, -1, -1), one_right, utils.grid_basis(CPU))
    assert_close(moved[..., :-1], images[..., 1:], atol=1e-4, rtol=0)


def test_augmentation_fills_its_ranges(monkeypatch):
    monkeypatch.setattr(utils, "warp", lambda *arguments: arguments)
    recipe = {**STILL, "rotation": 10, "scale": 0.1, "translate": 0.1, "elastic": 0.5}
    images = torch.zeros(5000, 1, 28, 28)
    _, matrices, shifts, _ = utils.augment(images, recipe, torch.Generator().manual_seed(0))
    assert shifts.std() == pytest.approx(0.5, abs=0.01)
    linear = matrices[:, :, :2]
    scale = 1 / torch.linalg.det(linear).sqrt()
    angle = torch.rad2deg(torch.atan2(linear[:, 0, 1], linear[:, 0, 0]))
    offset = (torch.linalg.inv(linear) @ matrices[:, :, 2:]).squeeze(2) / 2  # fraction of the side
    for values in ((scale - 1) / 0.1, angle / 10, offset / 0.1):
        assert -1.002 <= values.min() < -0.96
        assert 0.96 < values.max() <= 1.002


def test_each_image_is_augmented_for_itself_and_by_the_generator_alone():
    same = mnist(train=True).images[:1].expand(50, -1, -1, -1) / 255
    seed = torch.Generator().manual_seed
    first = utils.augment(same, RECIPE, seed(0))
    assert torch.equal(first, utils.augment(same, RECIPE, seed(0)))
    assert len(first.unique(dim=0)) == 50
