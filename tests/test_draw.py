"""The page on which one draws a digit, in headless Chromium, and its export."""

import base64
import copy
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import HANDWRITING, ROOT
from PIL import Image
from test_photos import VARIANTS, likeness, number, photo

import model as network
import utils
from extras import export, photos
from model import Net

pytestmark = pytest.mark.original
PAGE = ROOT / "assets" / "draw.html"
OTHER_DATA = {"data_crc": 0}  # a checkpoint of another data set than MNIST


def parse(strokes: str) -> list[list[tuple[int, ...]]]:
    """Points (x, y) of each stroke; a slash stands between strokes."""
    points = [stroke.split() for stroke in strokes.split("/")]
    return [[tuple(map(int, point.split(","))) for point in stroke] for stroke in points]


# Strokes of each digit, in percent of the sheet.
DIGITS = [*map(parse, [
    "56,20 44,22 34,36 32,55 38,74 50,80 62,73 68,55 66,36 57,22 50,20",  # 0
    "52,18 50,40 49,60 48,82",  # 1
    "32,34 38,22 52,18 64,26 64,40 54,56 42,70 32,80 48,79 68,80",  # 2
    "34,26 44,18 58,20 62,32 54,44 44,47 58,52 65,64 58,78 44,82 33,74",  # 3
    "40,20 36,36 32,52 44,53 56,53 70,51 / 62,20 60,40 59,60 58,82",  # 4
    "40,20 38,34 36,46 48,43 60,48 65,60 60,74 48,81 34,76 / 40,20 66,19",  # 5
    "60,18 48,28 39,44 35,60 38,75 50,81 61,75 62,62 52,55 42,60 37,68",  # 6
    "32,22 48,22 66,21 60,38 53,56 48,70 45,82",  # 7
    "60,26 50,19 39,26 42,39 54,50 63,64 57,78 44,79 37,66 46,52 58,40 62,28",  # 8
    "62,30 52,20 40,26 38,40 48,47 59,41 63,28 62,48 60,66 57,82",  # 9
])]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    untested = "the page was not tested: "
    webdriver = pytest.importorskip("selenium.webdriver", reason=untested + "pip install selenium")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip(untested + "no chromedriver (Debian: apt install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    flags += " disable-background-networking disable-component-update window-size=1000,900"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture
def page(browser) -> Iterator:
    """The browser with the page opened. Afterwards: no error, and nothing was requested."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what was logged before
    browser.get(PAGE.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert PAGE.as_uri() in urls
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


def text(page, name: str) -> str:
    """What stands in the element called `name` once the page has drawn what it was told."""
    page.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    return page.find_element("id", name).text


def draw(page, strokes: list[list[tuple[int, int]]], kind: str = "mouse"):
    """Draw with a "mouse", "pen" or "touch"."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    sheet = page.execute_script("return document.getElementById('drawing').getBoundingClientRect()")
    actions = ActionBuilder(page, mouse=PointerInput(kind, kind), duration=0)
    for stroke in strokes:
        places = [
            (round(sheet["x"] + sheet["width"] * x / 100),
             round(sheet["y"] + sheet["height"] * y / 100))
            for x, y in stroke
        ]
        actions.pointer_action.move_to_location(*places[0]).pointer_down()
        for place in places[1:]:
            actions.pointer_action.move_to_location(*place)
        actions.pointer_action.pointer_up()
    actions.perform()


def hand_over(page, event: str, name: str, content: bytes):
    """A "paste" or "drop" of one file; returns when it was read or refused."""
    page.execute_async_script(
        """
        const [event, name, content, done] = arguments;
        const files = new DataTransfer();
        files.items.add(new File([bytes(content)], name));
        const changes = { subtree: true, childList: true, characterData: true };
        new MutationObserver(() => done()).observe(document.body, changes);
        const Event = { paste: ClipboardEvent, drop: DragEvent }[event];
        document.dispatchEvent(new Event(event, { clipboardData: files, dataTransfer: files }));
        """,
        event, name, base64.b64encode(content).decode(),
    )


def png(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def run_network(page, script: str, images: torch.Tensor) -> torch.Tensor:
    """What `script` makes of each `image`, uint8 (N, 1, 28, 28) as base64, in the page."""
    words = [base64.b64encode(image.numpy()).decode() for image in images]
    script = f"return arguments[0].map(image => Array.from({script}))"
    return torch.tensor(page.execute_script(script, words))


def side_by_side(number: str) -> list[list[tuple[float, float]]]:
    """Strokes of the digits of `number`, each in its share of the sheet."""
    share = 1 / len(number)
    return [
        [(share * (100 * i + 1.5 * x - 25), 50 + 1.5 * share * (y - 50)) for x, y in stroke]
        for i, digit in enumerate(number)
        for stroke in DIGITS[int(digit)]
    ]


SMALL_3 = [[(60 + x / 4, 5 + y / 4) for x, y in stroke] for stroke in DIGITS[3]]
LEANING = [[(x + 12, 30), (x + 34, 29), (x + 24, 55), (x + 16, 80)] for x in (0, 20)]
DRAWINGS = {  # strokes and the answer
    **{str(digit): (strokes, str(digit)) for digit, strokes in enumerate(DIGITS)},
    **{number: (side_by_side(number), number) for number in ("472", "15", "80549")},
    "small 3 in a corner": (SMALL_3, "3"),
    "flagged 1": (parse("26,44 46,33 64,20 66,18 65,22 56,50 48,82"), "1"),
    "barred 7": (parse("30,24 50,22 68,20 60,44 50,82 / 34,54 50,52 72,50"), "7"),
    "4 with a gap": (parse("40,20 36,36 32,52 44,53 55,52 / 58,20 59,60 58,82"), "4"),
    "a dot": ([[(50, 50)]], "1"),
    "a scribble": (parse("20,70 70,30 30,40 80,75 50,15 25,55 75,50"), "(nine looks disagree)"),
    "leaning 77": (LEANING, "77"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_is_read(page, name):
    strokes, answer = DRAWINGS[name]
    draw(page, strokes, {"8": "pen", "3": "touch"}.get(name, "mouse"))
    read = text(page, "answer")
    assert read.endswith(answer) if "(" in answer else read == answer


@pytest.mark.parametrize("number, second", [("4", "9"), ("141", "191")])
def test_unsure_answer_names_two(page, number, second):
    page.execute_script(
        """
        const logits = { 1: [0, 9, 0, 0, 0, 0, 0, 0, 0, 0], 4: [0, 0, 0, 0, 4, 0, 0, 0, 0, 3] };
        const read = digit => ({ row: 0, probabilities: softmax(logits[digit]) });
        digits = Array.from(arguments[0], read);
        showAnswer(digits[0]);
        """,
        number,
    )
    assert text(page, "answer") == f"{number}, or perhaps {second}"


def test_undo_and_clear(page):
    from selenium.webdriver.common.keys import Keys

    body = page.find_element("tag name", "body")
    draw(page, DIGITS[7])
    draw(page, [DIGITS[4][1]])
    page.find_element("id", "undo").click()
    assert text(page, "answer") == "7"
    body.send_keys(Keys.CONTROL, "z")
    assert text(page, "answer") == "Nothing yet"
    for clear in (page.find_element("id", "clear").click, lambda: body.send_keys(Keys.ESCAPE)):
        draw(page, DIGITS[4])
        assert text(page, "answer") == "4"
        clear()
        assert text(page, "answer") == "Nothing yet"
        assert page.find_element("id", "hint").is_displayed()


def test_unsure_digits_are_looked_at_nine_times(page, test_split):
    model = network.load_pretrained(HANDWRITING)
    confidence = utils.predict(model, test_split.images).softmax(1).amax(1)
    images = test_split.images[confidence.argsort()[:30]]
    found = run_network(page, "read(network, bytes(image)).probabilities", images)
    one, nine = (utils.predict(model, images, tta).softmax(1) for tta in (False, True))
    assert (one - nine).abs().max() > 0.05
    torch.testing.assert_close(found, nine, atol=1e-3, rtol=0)


NAMES = ("white-on-black.png", "transparent-chalk.png", "tight.png")
KINDS = ("long", "tile", "squared", "strip", "small", "finger", "two rows")
PICTURES = {
    **{name: VARIANTS[name] for name in NAMES},
    **{f"{kind}.png": photo(kind, 0) for kind in ("lined", "shadow", "desk", "island")},
    **{f"{kind}.png": number(kind, 0)[0] for kind in KINDS},
}


@pytest.mark.parametrize("name", PICTURES)
def test_images_are_read_as_python_reads_them(page, tmp_path, name):
    PICTURES[name].save(tmp_path / name)
    _, prepared, row_lengths, is_doubtful = photos.read_rows(tmp_path / name)
    hand_over(page, "paste" if "shadow" in name else "drop", name, (tmp_path / name).read_bytes())
    read = photos.classify(network.load_pretrained(HANDWRITING), prepared).argmax(1)
    answer = photos.digits_to_text(read, row_lengths)
    assert text(page, "answer").split(",")[0] == answer
    assert (photos.MORE in text(page, "answer")) == is_doubtful == (name == "finger.png")
    pixels = page.execute_script("return digits.map(digit => Array.from(digit.pixels))")
    for ours, theirs in zip(torch.tensor(pixels).view(len(prepared), 28, 28), prepared.long()):
        assert likeness(ours, theirs) > 0.9


BLANK = Image.new("L", (200, 100), "white")


@pytest.mark.parametrize("content, message", [(b"seven", "is no image"), (png(BLANK), "is blank")])
def test_file_without_a_digit_is_one_line(page, content, message):
    hand_over(page, "drop", "a.png", content)
    assert text(page, "notice").startswith(f"a.png {message}")
    assert text(page, "answer") == "Nothing yet"


@pytest.mark.parametrize("pattern, damaged", [
    (r'("weights": ".{40000}).{16}', r"\1ffffffffffffffff"),  # three other weights
    (r'("weights": ")', r"\1?"), ('"silu"', '"relu"'), ('{"activation"', '{"'),
])
def test_damaged_network_is_refused(browser, tmp_path, pattern, damaged):
    page = re.sub(pattern, damaged, PAGE.read_text(encoding="utf-8"), count=1)
    (tmp_path / "draw.html").write_text(page, encoding="utf-8")
    assert refuses(browser, tmp_path)


def refuses(browser, folder: Path) -> bool:
    """Whether the page in `folder` says that it is damaged and shows no sheet."""
    browser.get((folder / "draw.html").as_uri())
    words = "The network in this page is damaged, or the page computes"
    damaged = text(browser, "refusal").startswith(words)
    return damaged and not browser.find_element("id", "drawing").is_displayed()


@pytest.mark.parametrize("settings", [{"width": 2}, {"activation": "relu"}, {"activation": "gelu"}])
def test_networks_are_exported(browser, test_split, tmp_path, monkeypatch, settings):
    monkeypatch.setitem(network.ACTIVATIONS, "gelu", torch.nn.GELU)
    model, images = Net(**settings).eval(), test_split.images[:20]
    model.blocks.insert(3, copy.deepcopy(model.blocks[2]))
    export.export_page(model, tmp_path / "draw.html", OTHER_DATA)
    browser.get((tmp_path / "draw.html").as_uri())
    assert "MNIST" not in text(browser, "handwriting")
    assert "digit" not in text(browser, "title") + text(browser, "hint")
    logits = run_network(browser, "forward(network, bytes(image)).logits", images)
    torch.testing.assert_close(logits, utils.predict(model, images), atol=1e-3, rtol=0)


@pytest.mark.parametrize("layer, other, words", [
    ("fc2", torch.nn.Identity(), "draw.html cannot run this network"),
    ("act", torch.nn.Mish(), "Mish; add it to ACTIVATIONS in assets/draw.html"),
])
def test_network_that_the_page_cannot_run_is_not_exported(tmp_path, layer, other, words):
    model = Net()
    model.set_submodule(layer, other)
    with pytest.raises(utils.UserError, match=re.escape(words)):
        export.export_page(model.eval(), tmp_path / "draw.html", OTHER_DATA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layer, other", [
    ("blocks.2.act", torch.nn.GELU()), ("pool", torch.nn.AdaptiveAvgPool2d(3)),
    ("blocks.2.conv", torch.nn.Conv2d(24, 24, 2, padding="same")),
])
def test_page_whose_logits_would_differ_refuses_itself(browser, tmp_path, layer, other):
    model = network.load_pretrained(HANDWRITING)
    model.set_submodule(layer, other)
    export.export_page(model.eval(), tmp_path / "draw.html", OTHER_DATA)
    assert refuses(browser, tmp_path)
