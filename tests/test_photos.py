"""Photos and scans of digits: real test digits, rendered as people might send them."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import HANDWRITING, ROOT, mnist
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from torch import Tensor

from extras.photos import MORE, describe, find_images, read_images, read_number, read_raw
from model import load_pretrained
from utils import UserError

MNIST = mnist(train=False)


def ink(index: int, side: int = 300, room: int = 0) -> Image.Image:
    """Test digit `index` enlarged, smooth: mode L, 255 on 0, with `room` pixels around it."""
    digit = Image.fromarray(MNIST.images[index, 0].numpy())
    large = digit.resize((side, side), Image.Resampling.BICUBIC)
    smooth = large.filter(ImageFilter.GaussianBlur(side / 80))
    return ImageOps.expand(smooth.point(lambda value: min(max(8 * (value - 110), 0), 255)), room)


def scan(index: int) -> Image.Image:
    """Test digit `index` as a photo: off centre on tinted, noisy paper, in uneven light."""
    rng = np.random.default_rng(index)
    left, top, right, bottom = rng.integers(0, 200, 4).tolist()
    digit = ink(index, int(rng.integers(150, 500)))
    mask = np.asarray(ImageOps.expand(digit, (left, top, right, bottom)))
    paper, pen = rng.uniform(190, 250) + rng.uniform(-10, 10, 3), rng.uniform(10, 90, 3)
    picture = paper + (pen - paper) * (mask[..., None] / 255)
    light = np.linspace(1, rng.uniform(0.4, 1), mask.shape[1])[:, None]
    picture = picture * light + rng.normal(0, rng.uniform(1, 8), picture.shape)
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    return image if index % 4 else ImageOps.invert(image)


def photo(kind: str, index: int) -> Image.Image:
    """A test digit on paper: "lined", in a "shadow" with a sharp edge, on a "desk", or a "scan".

    An "island" is a small sheet on a desk.
    """
    if kind == "scan":
        return scan(index)
    picture = 225 - 180 * (np.asarray(ink(index, 150, 75)) / 255)
    if kind == "lined":
        picture[::25] -= 30
    if kind == "shadow":
        picture[:, picture.shape[1] // 2 :] *= 0.55
    picture += np.random.default_rng(0).normal(0, 3, picture.shape)
    sheet = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    margins = {"desk": (60, 0, 90, 120), "island": (220, 160, 180, 240)}
    return ImageOps.expand(sheet, margins[kind], 110) if kind in margins else sheet


DOWN = {"two rows": [0, 0, 220, 220], "stacked": [0, 150], "jumping": [0, 40, -40]}


def number(kind: str, k: int) -> tuple[Image.Image, str]:
    """The `k`-th picture of a `kind`, test digits in dark ink, and the digits that are in it."""
    count = {"long": 10, "tile": 1, "circled": 1 + k % 3, "two rows": 4, "stacked": 2}.get(kind, 3)
    indices = range(10 * k, 10 * k + count)
    room, side = {"long": 10, "form": 40}.get(kind, 35), 140
    row, x = Image.new("L", (2000, 500)), 300
    for place, digit in enumerate(ink(index, side) for index in indices):
        left, top, right, bottom = digit.getbbox()
        down = DOWN.get(kind, [0] * 10)[place]
        back = {"two rows": 250, "stacked": 100}.get(kind, 0) if down else 0
        row.paste(digit.crop(digit.getbbox()), (x - back, 100 + (side - bottom + top) // 2 + down))
        if kind == "form":
            box = (x - 20, 80, x + right - left + 20, 260)
            ImageDraw.Draw(row).rectangle(box, outline=200, width=3)
        x += right - left + room
    draw = ImageDraw.Draw(row)
    left, top, right, bottom = row.getbbox()
    if kind == "circled":
        draw.ellipse((left - 50, top - 50, right + 50, bottom + 50), outline=255, width=5)
    if kind == "underlined":
        draw.line((left - 30, bottom + 14, right + 30, bottom + 18), fill=255, width=5)
    if kind == "leaning":  # by 20 degrees, to either side
        row = row.transform(row.size, Image.Transform.AFFINE, (1, (-1) ** k * 0.364, -70, 0, 1, 0))
    row = ImageOps.expand(row.crop(row.getbbox()), 80)
    if kind == "strip":
        row = ImageOps.expand(row, (2500, 0)).crop((0, 60, 5000 + row.width, row.height - 60))
    if kind == "small":
        row = ImageOps.expand(row, 2000).reduce(2)
    if kind in ("ruled", "squared"):  # askew; two thirds as dark as the ink
        lines = Image.new("L", row.size)
        for at in range(-100, 2000, 70):
            rise = 80 * (-1) ** k
            draw = ImageDraw.Draw(lines)
            draw.line((0, at, 2000, at + rise), fill=160, width=3)
            if kind == "squared":
                draw.line((at, 0, at - rise, 2000), fill=160, width=3)
        row = ImageChops.lighter(row, lines)
    if kind == "finger":  # at the left border, beside the digits
        ImageDraw.Draw(row).ellipse((-60, 60, 12, row.height - 50), fill=200)
    if kind == "tile":
        image = ImageOps.expand(row, 90, 255)
    else:
        image = row.point(lambda value: 230 - value * 200 // 255)
    text = "".join(str(int(MNIST.labels[index])) for index in indices)
    first = {"two rows": 2, "stacked": 1}.get(kind)  # digits in the first row
    return image, f"{text[:first]} {text[first:]}" if first else text


def likeness(a: Tensor, b: Tensor) -> float:
    """Correlation of two digits at the best of nine shifts."""
    shifts = [a.roll((y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    pairs = [torch.stack([shift.flatten(), b.flatten()]).float() for shift in shifts]
    return max(torch.corrcoef(pair)[0, 1].item() for pair in pairs)


PHOTOS = ["scan", "lined", "shadow", "desk", "island"]
NUMBERS = [
    "form", "circled", "underlined", "tile", "long", "leaning", "ruled", "squared", "strip",
    "small", "finger", "jumping", "stacked", "two rows",
]


@pytest.mark.original
@pytest.mark.parametrize("kind", [*PHOTOS, *NUMBERS])
def test_pictures_are_read(kind, tmp_path):
    """Of ten numbers eight at least, of photos nine, of 60 scans 58."""
    count, least = (60, 58) if kind == "scan" else (10, 9 if kind in PHOTOS else 8)
    for k in range(count):
        if kind in PHOTOS:
            image, answer = photo(kind, k), f"{MNIST.labels[k]}"
        else:
            image, answer = number(kind, k)
        path = tmp_path / answer / f"{k}.bmp"  # fast
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    results, _ = read_images(load_pretrained(HANDWRITING), [tmp_path], labels=True)
    assert results["labelled"] == count and results["right"] >= least, results
    doubts = sum("doubt" in report for report in results["images"])
    assert doubts >= 8 if kind == "finger" else doubts <= count / 5


@pytest.mark.parametrize("side", [28, 64, 300, 1200])
def test_prepared_digits_are_framed_as_mnist(side, tmp_path):
    for i in range(10):
        path = str(tmp_path / "digit.png")  # a string, as README has it
        ImageOps.invert(ink(i, side)).save(path)
        _, (digit,) = read_number(path)
        assert digit.shape == (28, 28) and digit.dtype == torch.uint8 and digit.max() == 255
        y, x = (digit > 100).nonzero().T
        assert 18 <= max(y.max() - y.min(), x.max() - x.min()) + 1 <= 20
        middle = [digit.float().sum(axis) @ torch.arange(28.0) / digit.sum() for axis in (0, 1)]
        assert max(abs(m - 14) for m in middle) < 0.75
        assert likeness(digit, MNIST.images[i, 0]) > 0.85


DARK = ink(0, 300, 50)  # the test set's first digit, a 7
PLAIN, SPECKED = ImageOps.invert(DARK), ImageOps.invert(DARK)
for left, top in ((5, 5), (200, 396), (390, 30)):
    SPECKED.paste(0, (left, top, left + 4, top + 4))
CLEAR = Image.merge("LA", [Image.new("L", DARK.size), DARK])
RED, GREEN = DARK.point(lambda v: 250 - v), DARK.point(lambda v: 50 + v // 2)  # as bright
TURNED = Image.Exif()
TURNED[0x0112] = 6  # the camera was held upright
VARIANTS = {
    "white-on-black.png": DARK,
    "grey-on-grey.png": PLAIN.point(lambda value: 105 + value // 10),
    "one-bit.png": PLAIN.convert("1", dither=Image.Dither.NONE),
    "tight.png": PLAIN.crop(DARK.getbbox()),
    "framed.png": ImageOps.expand(PLAIN, 12, 20),
    "specked.png": SPECKED,
    "cmyk.jpg": PLAIN.convert("CMYK"),
    "damaged-exif.jpg": PLAIN,
    "turned.jpg": PLAIN.transpose(Image.Transpose.ROTATE_90),
    "palette.png": CLEAR.convert("RGBA").quantize(16),
    "turned-transparent.png": CLEAR.transpose(Image.Transpose.ROTATE_90),
    "transparent.png": CLEAR,
    "transparent-chalk.png": Image.merge("LA", [Image.new("L", DARK.size, 255), DARK]),
    **dict.fromkeys(["animated.gif", "animated.webp", "animated.png"], PLAIN),
    "green-on-red.png": Image.merge("RGB", [RED, GREEN, Image.new("L", DARK.size)]),
    "16-bit.png": Image.fromarray(np.asarray(PLAIN, np.uint16) * 100 + 4000),
    "float.tiff": PLAIN.convert("F"),
}

BLANK = Image.new("L", PLAIN.size, 255)
FRAMES = {"save_all": True, "append_images": [PLAIN, BLANK]}
SAVED_WITH = {
    "animated": FRAMES, "turned": {"exif": TURNED}, "damaged": {"exif": b"Exif\0\0II*\0"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_should_not_matter_does_not(name, tmp_path):
    first = BLANK if "animated" in name else VARIANTS[name]
    first.save(tmp_path / name, **SAVED_WITH.get(re.match("[a-z]*", name)[0], {}))
    PLAIN.save(tmp_path / "plain.png")
    shown, (digit,) = read_number(tmp_path / name)
    assert shown.mode == "RGB"
    assert likeness(digit, read_number(tmp_path / "plain.png")[1][0]) > 0.9


def test_of_pages_the_first_is_read(tmp_path, capsys):
    PLAIN.save(tmp_path / "pages.tiff", save_all=True, append_images=[BLANK])
    assert len(read_number(tmp_path / "pages.tiff")[1]) == 1
    assert "pages.tiff: only the first of 2 pages is read" in capsys.readouterr().err


@pytest.mark.original
def test_touching_digits_are_a_doubt(tmp_path):
    image, _ = number("plain", 0)
    ImageDraw.Draw(image).line((100, 130, image.width - 100, 130), fill=30, width=12)
    image.save(tmp_path / "a.png")
    assert read_images(load_pretrained(HANDWRITING), [tmp_path])[0]["images"][0]["doubt"] == MORE


@pytest.mark.original
def test_raw_pixels_are_the_networks(tmp_path):
    (tmp_path / "7").mkdir()
    Image.fromarray(MNIST.images[0, 0].numpy()).save(tmp_path / "7" / "a.png")
    assert torch.equal(read_raw(tmp_path / "7" / "a.png")[1], MNIST.images[0])
    model = load_pretrained(HANDWRITING)
    assert read_images(model, [tmp_path], labels=True, raw=True)[0]["right"] == 1
    PLAIN.save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large\.png: 400 x 400 pixels"):
        read_raw(tmp_path / "large.png")


@pytest.mark.original
def test_labels_are_numbers(tmp_path):
    image, answer = number("two rows", 0)
    for folder, saved in {"7": PLAIN, "4": PLAIN, answer.replace(" ", ""): image}.items():
        (tmp_path / folder).mkdir()
        saved.save(tmp_path / folder / "a.png")
    model = load_pretrained(HANDWRITING)
    assert read_images(model, [tmp_path], labels=True)[0]["right"] == 2
    (tmp_path / "4").rename(tmp_path / "seven")
    for missing in ("nowhere/a.png", "x" * 300):
        assert read_images(model, [tmp_path / missing], labels=True)[1] == 1
    with pytest.raises(UserError, match="seven is named after no number"):
        read_images(model, [tmp_path], labels=True)


def test_what_cannot_be_read_is_one_line_each(call, trained, tmp_path):
    words = {
        "white.png": "blank", "small.png": "too few", "large.png": "too many",
        "text.png": "Pillow can read", "half.png": "truncated", "empty": "no images",
        "missing.png": "No such file", "photo.heic": "pip install pillow-heif",
    }
    Image.new("L", (90, 90), 255).save(tmp_path / "white.png")
    Image.new("L", (7, 90), 255).save(tmp_path / "small.png")
    Image.new("1", (9000, 8000)).save(tmp_path / "large.png")
    for name in ("text.png", "photo.heic"):
        (tmp_path / name).write_text("seven")
    PLAIN.save(tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:3000])
    (tmp_path / "empty").mkdir()
    for name, word in words.items():
        with pytest.raises(UserError, match=word) as error:
            read_number(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
    paths = [tmp_path / name for name in [*words, "good.png"]]
    out, err = call("test_model.py", "--checkpoint", trained, "--images", *paths, status=1)
    assert len(err.splitlines()) == len(words)
    assert out.startswith(f"{tmp_path / 'good.png'}\t7\t")


def test_second_guess():
    sure, unsure = torch.eye(10)[3], torch.eye(10)[4] * 0.6 + torch.eye(10)[9] * 0.4
    report = describe("a.png", torch.stack([sure, unsure]), [2])
    assert report["number"] == "34" and report["second_guess"] == "39"
    assert "second_guess" not in describe("a.png", sure[None], [1])


def test_find_images(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)
    names = ("a.tif", "b/2.PNG", "b/a b\t.jpg", "ä.webp")
    others = ("notes.txt", "photo.heic", "page.pdf", "page 2.pdf", "b/.hidden.png", ".git/x.png")
    for name in names + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    missing = tmp_path / ("x" * 300)
    assert find_images([missing, tmp_path]) == [missing, *(tmp_path / name for name in names)]
    words = "4 files skipped: .heic, .pdf, .txt (.heic needs pip install pillow-heif)"
    assert words in capsys.readouterr().err
    # Windows' shell hands over * as it is.
    assert find_images([tmp_path / "*.tif", tmp_path / "b" / "*.?*g", tmp_path / "*.gif"]) == [
        *(tmp_path / name for name in ("a.tif", "b/a b\t.jpg")), tmp_path / "*.gif"
    ]


def test_json_and_labels(call, trained, tmp_path):
    for folder in ("7", "47", "3"):
        (tmp_path / folder).mkdir()
        PLAIN.save(tmp_path / folder / "a.png")
    flags = ("--checkpoint", trained / "model.pt", "--images", tmp_path, "--json", "-")
    assert "\nAccuracy: 33.33% (1 of 3)\n" in call("test_model.py", *flags[:4], "--labels")[0]
    plain = json.loads(call("test_model.py", *flags)[0])
    labelled = json.loads(call("test_model.py", *flags, "--labels")[0])
    assert "accuracy" not in plain and not any("label" in image for image in plain["images"])
    assert [image["label"] for image in labelled["images"]] == ["3", "47", "7"]
    assert labelled["accuracy"] == pytest.approx(1 / 3)
    assert labelled["right"] == 1 and labelled["labelled"] == 3
    image = plain["images"][2]
    (shares,) = (digit["probabilities"] for digit in image["digits"])
    assert image["path"] == str(tmp_path / "7" / "a.png") and image["number"] == "7"
    assert image["confidence"] == max(shares) and sum(shares) == pytest.approx(1)


def test_command_line(trained, tmp_path):
    odd = tmp_path / os.fsdecode(b"7\xff.png") if sys.platform == "linux" else tmp_path / "7ÿ.png"
    PLAIN.save(odd)
    paths = odd, tmp_path / "missing.png"
    command = [sys.executable, "test_model.py", "--checkpoint", trained, "--images", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and done.stdout.split(b"\t")[1] == b"7"
    assert done.stderr.count(b"\n") == 1 and b"missing.png: No such file" in done.stderr
