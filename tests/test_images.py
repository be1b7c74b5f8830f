"""Photos and scans of digits: `read_digit`, `prepare_digit`, `find_images`, and `test_model.py --images`."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from utils import UserError, find_images, prepare_digit, read_digit

FONTS = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVuSans.ttf"))
# Strokes by hand on a field of 100 x 100; each line is one movement of the pen.
STROKES: dict[int, list[list[tuple[int, int]]]] = {
    0: [[(50, 8), (30, 22), (24, 50), (32, 80), (50, 92), (68, 80), (76, 50), (70, 22), (50, 8)]],
    1: [[(52, 8), (50, 92)]],
    2: [[(26, 26), (36, 11), (56, 8), (72, 22), (68, 42), (46, 66), (24, 90), (78, 88)]],
    3: [[(28, 14), (52, 8), (70, 22), (62, 40), (44, 46), (66, 54), (74, 72), (56, 91), (26, 86)]],
    4: [[(36, 8), (26, 54), (76, 54)], [(64, 10), (60, 92)]],
    5: [[(34, 12), (30, 44), (54, 42), (72, 56), (70, 78), (52, 91), (26, 86)], [(36, 11), (74, 9)]],
    6: [[(64, 8), (40, 30), (28, 64), (38, 88), (60, 90), (72, 74), (62, 56), (40, 58), (30, 72)]],
    7: [[(24, 12), (76, 10), (58, 46), (44, 92)]],
    8: [[(68, 16), (48, 8), (32, 22), (42, 40), (64, 58), (70, 78), (50, 92), (30, 78), (38, 58), (64, 38), (68, 16)]],
    9: [[(70, 26), (52, 8), (32, 20), (32, 42), (52, 50), (69, 34), (70, 20), (66, 60), (56, 92)]],
}  # fmt: skip


def draw(digit: int, side: int = 200, pen: float = 0.07, angle: float = 0.0, room: float = 0.8) -> np.ndarray:
    """Ink (side, side), 0 to 1, of `digit` drawn by hand, turned by `angle` degrees, in the middle."""
    image = Image.new("L", (4 * side, 4 * side))
    canvas, width = ImageDraw.Draw(image), max(1, round(4 * side * pen * room))
    for stroke in STROKES[digit]:
        points = [tuple(4 * side * (0.5 + room * (v / 100 - 0.5)) for v in point) for point in stroke]
        canvas.line(points, 255, width, joint="curve")
        for x, y in points:
            canvas.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], 255)
    image = image.rotate(angle, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def on_paper(ink: np.ndarray, paper: float = 220, pen: float = 40, noise: float = 0, slope: float = 0) -> np.ndarray:
    """Luminance uint8 of `ink` on paper, with noise and with light that falls by the fraction `slope`."""
    light = 1 - slope * np.linspace(0, 1, ink.shape[1])[None]
    gray = (paper + (pen - paper) * ink) * light + np.random.default_rng(0).normal(0, noise or 1e-9, ink.shape)
    return gray.clip(0, 255).round().astype(np.uint8)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two images at the best of nine shifts: the centre of mass may round either way."""
    shifted = [np.roll(a, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return max(float(np.corrcoef(s.ravel(), b.ravel())[0, 1]) for s in shifted)


@pytest.mark.parametrize("digit", range(10))
@pytest.mark.parametrize("side", [28, 64, 200, 1500])
def test_prepared_digit_fits_mnist(digit: int, side: int) -> None:
    prepared = prepare_digit(on_paper(draw(digit, side)))
    assert prepared.shape == (28, 28) and prepared.dtype == np.uint8 and prepared.max() >= 250
    rows, columns = (np.flatnonzero((prepared > 127).any(axis)) for axis in (1, 0))
    assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
    y, x = np.indices((28, 28)) + 0.5
    assert abs((prepared * y).sum() / prepared.sum() - 14) <= 0.75
    assert abs((prepared * x).sum() / prepared.sum() - 14) <= 0.75


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "light on dark": lambda ink: 255 - on_paper(ink),
    "one bit": lambda ink: 255 * (ink < 0.5).astype(np.uint8),
    "grey on grey": lambda ink: on_paper(ink, 130, 105, noise=1),
    "uneven light": lambda ink: on_paper(ink, 230, 60, noise=2, slope=0.6),
    "noise": lambda ink: on_paper(ink, 210, 50, noise=15),
    "off centre": lambda ink: on_paper(np.pad(ink, ((0, 150), (230, 0)))),
    "tight": lambda ink: on_paper(ink[np.ix_((ink > 0.5).any(1), (ink > 0.5).any(0))]),
    "dark frame": lambda ink: np.pad(on_paper(ink), 10, constant_values=20),
    "enlarged": lambda ink: on_paper(ink).repeat(3, 0).repeat(3, 1),
}


@pytest.mark.parametrize("digit", range(10))
@pytest.mark.parametrize("change", CHANGES)
def test_what_should_not_matter_does_not(digit: int, change: str) -> None:
    if (digit, change) == (1, "tight"):
        pytest.skip("a bar that fills its frame shows no paper")
    ink = draw(digit)
    assert likeness(prepare_digit(CHANGES[change](ink)), prepare_digit(on_paper(ink))) > 0.9


@pytest.mark.parametrize("digit", range(10))
def test_dust_stays_out_and_a_hairline_survives(digit: int) -> None:
    ink = draw(digit)
    dusty = ink.copy()
    dusty[4:7, 4:7] = dusty[190:193, 100:102] = dusty[90:92, 196:199] = 1
    assert likeness(prepare_digit(on_paper(dusty)), prepare_digit(on_paper(ink))) > 0.98
    hair = prepare_digit(on_paper(draw(digit, 2000, pen=0.0015)))
    assert likeness(hair, prepare_digit(on_paper(draw(digit, 2000, pen=0.08)))) > 0.7


def test_separate_bar_of_a_five_is_kept() -> None:
    ink = draw(5, 200, 0.06)
    ink[22:40] *= 0
    whole = prepare_digit(on_paper(draw(5, 200, 0.06)))
    ink[8:20, 80:150] = 1
    rows = np.flatnonzero((prepare_digit(on_paper(ink)) > 127).any(1))
    assert np.ptp(rows) >= 17 and whole.max() == 255


@pytest.mark.parametrize("value", [0, 128, 255])
def test_blank_image_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="blank"):
        prepare_digit(np.full((50, 40), value, np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def variants() -> dict[str, bytes]:
    """Files that hold the same digit 3 in unusual ways."""
    ink = draw(3, 120)
    gray, dark = Image.fromarray(on_paper(ink)), Image.fromarray((255 * ink).astype(np.uint8))
    clear = Image.merge("LA", (Image.new("L", gray.size), dark))
    chalk = Image.merge("LA", (Image.new("L", gray.size, 255), dark))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = clear.convert("RGBA").quantize(16)
    sixteen = Image.fromarray(on_paper(ink).astype(np.uint16) * 100)
    return {
        "16-bit.png": encode(sixteen, "PNG"),
        "clear.png": encode(clear, "PNG"),
        "chalk.png": encode(chalk, "PNG"),
        "palette.png": encode(palette, "PNG"),
        "animated.gif": encode(gray, "GIF", save_all=True, append_images=[Image.new("L", gray.size)]),
        "cmyk.jpg": encode(gray.convert("CMYK"), "JPEG"),
        "turned.jpg": encode(gray.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif),
        "float.tiff": encode(gray.convert("F"), "TIFF"),
        "bit.bmp": encode(gray.convert("1", dither=Image.Dither.NONE), "BMP"),
        "really-png.jpg": encode(gray, "PNG"),
        "phone.jpg": encode(gray.resize((4000, 4000)), "JPEG"),
    }


@pytest.mark.parametrize("name", variants())
def test_unusual_files_hold_the_same_digit(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(variants()[name])
    original, prepared = read_digit(path)
    assert original.mode == "RGB" and max(original.size) <= 1024
    assert likeness(prepared.numpy(), prepare_digit(on_paper(draw(3, 120)))) > 0.9


def hostile(seed: int) -> tuple[str, bytes]:
    """One of eight kinds of file that should not be answered with a traceback."""
    rng = np.random.default_rng(seed)
    name, whole = list(variants().items())[rng.integers(10)]
    damaged = bytearray(whole)
    for at in rng.integers(0, len(whole), 20):
        damaged[at] = rng.integers(256)
    flat = Image.new("L", (60, 60), int(rng.integers(256)))
    noise = Image.fromarray(rng.integers(0, 256, (80, 80), np.uint8))
    cases = [
        ("zero.png", b""),
        (name, whole[: rng.integers(1, len(whole))]),
        (name, bytes(damaged)),
        ("one.png", encode(Image.new("L", (1, 1)), "PNG")),
        ("flat.png", encode(flat, "PNG")),
        ("noise.png", encode(noise, "PNG")),
        ("text.png", rng.bytes(500)),
        ("thin.png", encode(Image.new("L", (9000, 8), 200), "PNG")),
    ]
    name, contents = cases[seed % len(cases)]
    return f"{seed}-{name}", contents


def test_hostile_files_get_an_answer_or_one_line(tmp_path: Path, full: bool) -> None:
    for seed in range(300 if full else 40):
        name, contents = hostile(seed)
        (tmp_path / name).write_bytes(contents)
        try:
            _, prepared = read_digit(tmp_path / name)
            assert prepared.shape == (28, 28)
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True})])
def test_huge_image_needs_little_memory(kind: str, options: dict, tmp_path: Path, full: bool) -> None:
    if kind == "JPEG" and not full:
        pytest.skip("--full: takes seconds to write")
    path = tmp_path / "huge.img"
    path.write_bytes(encode(Image.new("L", (20_000, 20_000), 200), kind, **options))
    code = (
        "import resource, sys; from pathlib import Path; import utils\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: utils.read_digit(Path(sys.argv[1]))\n"
        "except utils.UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = Path(sys.modules["utils"].__file__).parent
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60,
                            env={**os.environ, "PYTHONPATH": str(root)}, check=True)  # fmt: skip
    message, grown = result.stdout.splitlines()
    assert str(path) in message and int(grown) < 300_000 and not result.stderr


def test_find_images(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.tif", "notes.txt", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    missing = tmp_path / "missing.png"
    assert find_images([missing, tmp_path]) == [missing, *(tmp_path / n for n in ("a.tif", "b/1.jpg", "b/2.PNG"))]
    (tmp_path / "empty").mkdir()
    assert find_images([tmp_path / "empty"]) == [tmp_path / "empty"]
    with pytest.raises(UserError, match="no images"):
        read_digit(tmp_path / "empty")
    with pytest.raises(UserError, match="no such file"):
        read_digit(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="no such file"):
        read_digit(missing)


def printed(digit: int, size: int) -> np.ndarray:
    """Ink of `digit` in a printed font."""
    image = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size // 2, size // 4), str(digit), 255, ImageFont.truetype(str(FONTS[0]), size))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(size / 60)), np.float32) / 255


def test_drawn_digits_are_read(run: Callable, released: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(100):
        digit, side = i % 10, int(rng.choice([20, 28, 60, 200, 700]))
        ink = draw(digit, side, rng.uniform(0.05, 0.12), rng.uniform(-10, 10), rng.uniform(0.6, 0.9))
        gray = on_paper(ink, rng.uniform(160, 240), rng.uniform(10, 90), rng.uniform(0, 4), rng.uniform(0, 0.3))
        (tmp_path / str(digit)).mkdir(exist_ok=True)
        Image.fromarray(gray if i % 3 else 255 - gray).save(tmp_path / str(digit) / f"{i}.png")
    *lines, accuracy = run("test_model.py", "--checkpoint", released, "--images", tmp_path).stdout.splitlines()
    assert len(lines) == 100 and all(0.1 <= float(line.split("\t")[2]) <= 1 for line in lines)
    assert float(accuracy.split()[1].rstrip("%")) >= 97


def test_printed_digit_and_a_bad_file_on_the_command_line(run: Callable, released: Path, tmp_path: Path) -> None:
    Image.fromarray(on_paper(printed(3, 150))).save(tmp_path / "three.png")
    (tmp_path / "zero.png").touch()
    result = run("test_model.py", "--checkpoint", released, "--images", tmp_path / "three.png", tmp_path / "zero.png",
                 status=1)  # fmt: skip
    assert result.stdout.split("\t")[:2] == [str(tmp_path / "three.png"), "3"]
    assert "zero.png" in result.stderr and "Traceback" not in result.stderr
