"""The page on which one draws a digit, in headless Chromium, and its export."""

from __future__ import annotations

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
from conftest import ROOT
from PIL import Image, ImageOps
from test_images import VARIANTS, likeness, photo

import model as network
import test_model
import utils
from model import Net

PAGE = ROOT / "assets" / "draw.html"

# Strokes of each digit: points (x, y) in percent of the sheet, y downwards.
DIGITS = {
    0: [[(56, 20), (44, 22), (34, 36), (32, 55), (38, 74), (50, 80), (62, 73), (68, 55), (66, 36), (57, 22), (50, 20)]],
    1: [[(52, 18), (50, 40), (49, 60), (48, 82)]],
    2: [[(32, 34), (38, 22), (52, 18), (64, 26), (64, 40), (54, 56), (42, 70), (32, 80), (48, 79), (68, 80)]],
    3: [[(34, 26), (44, 18), (58, 20), (62, 32), (54, 44), (44, 47), (58, 52), (65, 64), (58, 78), (44, 82), (33, 74)]],
    4: [[(40, 20), (36, 36), (32, 52), (44, 53), (56, 53), (70, 51)], [(62, 20), (60, 40), (59, 60), (58, 82)]],
    5: [[(40, 20), (38, 34), (36, 46), (48, 43), (60, 48), (65, 60), (60, 74), (48, 81), (34, 76)],
        [(40, 20), (66, 19)]],
    6: [[(60, 18), (48, 28), (39, 44), (35, 60), (38, 75), (50, 81), (61, 75), (62, 62), (52, 55), (42, 60), (37, 68)]],
    7: [[(32, 22), (48, 22), (66, 21), (60, 38), (53, 56), (48, 70), (45, 82)]],
    8: [[(60, 26), (50, 19), (39, 26), (42, 39), (54, 50), (63, 64), (57, 78), (44, 79), (37, 66), (46, 52), (58, 40),
         (62, 28)]],
    9: [[(62, 30), (52, 20), (40, 26), (38, 40), (48, 47), (59, 41), (63, 28), (62, 48), (60, 66), (57, 82)]],
}  # fmt: skip
# As they are written in much of Europe.
ELSEWHERE = {
    "flagged 1": (1, [[(26, 44), (46, 33), (64, 20), (66, 18), (65, 22), (56, 50), (48, 82)]]),
    "barred 7": (7, [[(30, 24), (50, 22), (68, 20), (60, 44), (50, 82)], [(34, 54), (50, 52), (72, 50)]]),
}  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Headless Chromium, or a line why there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page was not tested: pip install selenium")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("the page was not tested: no chromium and chromedriver (Debian: apt install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1000,900"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture
def page(browser) -> Iterator:
    """The browser with the page opened; afterwards, whatever was done there: no error, and nothing requested."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what was logged before
    browser.get(PAGE.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert PAGE.as_uri() in urls
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


def text(page, name: str) -> str:
    """What stands in the element called `name` once the page has drawn what it was told."""
    page.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    return page.find_element("id", name).text


def draw(page, strokes: list[list[tuple[int, int]]], kind: str = "mouse") -> None:
    """Draw with a "mouse", "pen" or "touch"."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    sheet = page.execute_script("return document.getElementById('drawing').getBoundingClientRect()")
    actions = ActionBuilder(page, mouse=PointerInput(kind, kind), duration=0)
    for stroke in strokes:
        places = [(round(sheet["x"] + sheet["width"] * x / 100), round(sheet["y"] + sheet["height"] * y / 100))
                  for x, y in stroke]  # fmt: skip
        actions.pointer_action.move_to_location(*places[0]).pointer_down()
        for place in places[1:]:
            actions.pointer_action.move_to_location(*place)
        actions.pointer_action.pointer_up()
    actions.perform()


def hand_over(page, event: str, name: str, content: bytes) -> None:
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
    )  # fmt: skip


def png(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def page_logits(page, images: torch.Tensor) -> torch.Tensor:
    """What the page's network computes of uint8 (N, 1, 28, 28): logits (N, 10)."""
    script = "return arguments[0].map(image => Array.from(forward(network, bytes(image)).logits))"
    return torch.tensor(page.execute_script(script, [base64.b64encode(image.numpy()).decode() for image in images]))


@pytest.fixture(scope="module")
def digits(test_split: utils.Split) -> utils.Split:
    """The first hundred test digits."""
    return test_split.select(slice(100))


def test_constants_are_those_of_test_model() -> None:
    """Page and Python prepare images with the same numbers, those of the same name at least."""
    constants = re.findall(r"^const ([A-Z_]+) = (\d\S*)(?: / (\d+))?;", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    shared = {name: float(value) / float(by or 1) for name, value, by in constants if hasattr(test_model, name)}
    assert shared == {name: getattr(test_model, name) for name in shared}
    assert {"WINDOW", "POLARITY", "INK_LEVEL", "OVERVIEW_SIZE", "UNSURE"} <= set(shared)


@pytest.mark.parametrize("digit", DIGITS)
def test_drawn_digit_is_read(page, digit: int):
    draw(page, DIGITS[digit])
    assert text(page, "answer") == str(digit)


@pytest.mark.parametrize("shape", ELSEWHERE)
def test_shape_from_elsewhere_is_read(page, shape: str):
    digit, strokes = ELSEWHERE[shape]
    draw(page, strokes)
    assert text(page, "answer") == str(digit)


@pytest.mark.parametrize("kind", ["pen", "touch"])
def test_pen_and_finger_draw_as_well(page, kind: str):
    draw(page, DIGITS[3], kind)
    assert text(page, "answer") == "3"


def test_size_and_place_do_not_matter(page):
    draw(page, [[(60 + x / 4, 5 + y / 4) for x, y in stroke] for stroke in DIGITS[3]])
    assert text(page, "answer") == "3"


def side_by_side(number: str) -> list[list[tuple[float, float]]]:
    """Strokes of the digits of `number`, each in its share of the sheet."""
    share = 1 / len(number)
    return [[(share * (100 * i + 1.5 * x - 25), 50 + 1.5 * share * (y - 50)) for x, y in stroke]
            for i, digit in enumerate(number) for stroke in DIGITS[int(digit)]]  # fmt: skip


@pytest.mark.parametrize("number", ["472", "15", "80549"])
def test_drawn_number_is_read(page, number: str):
    draw(page, side_by_side(number))
    assert text(page, "answer") == number


@pytest.mark.parametrize("strokes, answer", [
    ([[(40, 20), (36, 36), (32, 52), (44, 53), (55, 52)], [(58, 20), (59, 60), (58, 82)]], "4"),  # a gap between them
    ([[(x + 12, 30), (x + 34, 29), (x + 24, 55), (x + 16, 80)] for x in (0, 20)], "77"),  # one leans over the other
])  # fmt: skip
def test_neighbouring_strokes(page, strokes: list, answer: str):
    draw(page, strokes)
    assert text(page, "answer") == answer


def test_digit_that_is_tapped_is_shown(page):
    best = "return document.querySelector('#bars .best').lastChild.textContent"
    draw(page, side_by_side("472"))
    assert text(page, "answer") == "472" and page.execute_script(best) == "2"
    draw(page, [[(17, 50)]])  # on the 4
    assert text(page, "answer") == "472" and page.execute_script(best) == "4"
    assert page.execute_script("return strokes.length") == 4  # and no dot
    page.find_element("css selector", "#answer span:nth-child(2)").click()
    assert text(page, "answer") == "472" and page.execute_script(best) == "7"


def test_phone_held_sideways_sees_sheet_and_answer(page):
    screen = {"width": 812, "height": 375, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        draw(page, side_by_side("472"))
        assert text(page, "answer") == "472"
        for name in ("drawing", "open", "answer", "bars"):
            x, y, width, height = (page.find_element("id", name).rect[key] for key in ("x", "y", "width", "height"))
            assert x >= 0 and y >= 0 and x + width <= 812 and y + height <= 375
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("number, answer", [("4", "4, or perhaps 9"), ("141", "141, or perhaps 191")])
def test_unsure_answer_names_two(page, number: str, answer: str):
    page.execute_script(
        """
        const logits = { 1: [0, 9, 0, 0, 0, 0, 0, 0, 0, 0], 4: [0, 0, 0, 0, 4, 0, 0, 0, 0, 3] };
        digits = Array.from(arguments[0], digit => ({ logits: logits[digit] }));
        showAnswer(digits[0]);
        """,
        number,
    )
    assert text(page, "answer") == answer


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


def test_clear_in_the_middle_of_a_stroke(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    drag = ActionChains(page, duration=0).click_and_hold(page.find_element("id", "drawing")).move_by_offset(20, 20)
    drag.send_keys(Keys.ESCAPE).move_by_offset(20, 20).release().perform()
    assert text(page, "answer") == "Nothing yet"


def test_dot_is_read(page):
    draw(page, [[(50, 50)]])
    assert text(page, "answer") != "Nothing yet"
    assert max(page.execute_script("return Array.from(digitFromStrokes(strokes))")) > 200


@pytest.mark.parametrize("event", ["paste", "drop"])
@pytest.mark.parametrize("dark_on_light, side", [(False, 28), (True, 28), (True, 500)])
def test_image_of_a_digit_is_read(page, digits: utils.Split, event: str, dark_on_light: bool, side: int):
    for image, digit in list(zip(digits.images, digits.labels.tolist()))[:5]:
        picture = Image.fromarray(image[0].numpy()).resize((side, side), Image.BICUBIC)
        hand_over(page, event, "digit.png", png(ImageOps.invert(picture) if dark_on_light else picture))
        assert text(page, "answer").startswith(str(digit))


PICTURES = {
    **{name: VARIANTS[name] for name in ("white-on-black.png", "transparent-chalk.png", "tight.png")},
    **{f"{kind}.png": photo(kind, 0) for kind in ("lined", "shadow", "desk", "island")},
    "number.png": photo("number", 0, 1, 3, 5),
}


@pytest.mark.parametrize("name", PICTURES)
def test_images_are_read_as_python_reads_them(page, tmp_path: Path, name: str):
    PICTURES[name].save(tmp_path / name)
    prepared = test_model.read_number(tmp_path / name)[1]
    hand_over(page, "drop", name, (tmp_path / name).read_bytes())
    answer = test_model.digits_to_text(test_model.classify(network.load_pretrained(), prepared).argmax(1))
    assert text(page, "answer").split(",")[0] == answer
    pixels = page.execute_script("return digits.map(digit => Array.from(digit.pixels))")
    for ours, theirs in zip(torch.tensor(pixels).view(-1, 28, 28), prepared.long(), strict=True):
        assert likeness(ours, theirs) > 0.9


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("notes.txt", b"no image", "notes.txt is no image"),
        ("blank.png", png(Image.new("L", (200, 100), "white")), "blank.png is blank"),
    ],
)
def test_file_without_a_digit_is_one_line(page, name: str, content: bytes, message: str):
    hand_over(page, "drop", name, content)
    assert text(page, "notice").startswith(message)
    assert text(page, "answer") == "Nothing yet"


@pytest.mark.parametrize(
    "pattern, damaged",
    [
        (r'("weights": ".{40000}).{16}', r"\1ffffffffffffffff"),  # three other weights
        (r'("weights": ".{40000}).{16}', r"\1"),
        (r'("weights": ")', r"\1?"),
        ('"pool": true', '"pool": false'),
        ('"silu"', '"relu"'),
        ('{"activation"', '{"'),
    ],
)
def test_damaged_network_is_refused(browser, tmp_path: Path, pattern: str, damaged: str):
    page = re.sub(pattern, damaged, PAGE.read_text(encoding="utf-8"), count=1)
    (tmp_path / "draw.html").write_text(page, encoding="utf-8")
    browser.get((tmp_path / "draw.html").as_uri())
    assert text(browser, "refusal").startswith("The network in this page is damaged")
    assert not browser.find_element("id", "drawing").is_displayed()


def deeper() -> Net:
    """Five blocks."""
    model = Net()
    model.blocks.insert(3, copy.deepcopy(model.blocks[2]))
    return model


@pytest.mark.parametrize(
    "make",
    [Net, lambda: Net(width=2), lambda: Net(activation="relu", adaptive_pool="avg"), deeper,
     lambda: Net(activation="relu6"), lambda: Net(activation="gelu")],
)  # fmt: skip
def test_networks_are_exported(browser, digits: utils.Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make):
    monkeypatch.setitem(network.ACTIVATIONS, "relu6", torch.nn.ReLU6)
    monkeypatch.setitem(network.ACTIVATIONS, "gelu", torch.nn.GELU)
    model, images = make().eval(), digits.images[:20]
    test_model.export_page(model, tmp_path / "draw.html")
    browser.get((tmp_path / "draw.html").as_uri())
    torch.testing.assert_close(page_logits(browser, images), utils.predict(model, images), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: setattr(model.blocks[2], "act", torch.nn.GELU()),
        lambda model: setattr(model.blocks[2], "norm", torch.nn.GroupNorm(1, 24)),
        lambda model: setattr(model.blocks[2].conv, "stride", (2, 2)),
        lambda model: setattr(model.blocks[2], "conv", torch.nn.Conv2d(24, 24, 2, padding="same")),
        lambda model: setattr(model, "blocks", torch.nn.Sequential(torch.nn.Conv2d(1, 12, 3))),
        lambda model: setattr(model, "fc2", torch.nn.Identity()),
    ],
)
def test_network_that_the_page_cannot_run_is_not_exported(tmp_path: Path, edit):
    model = Net().eval()
    edit(model)
    with pytest.raises(utils.UserError, match=r"draw\.html cannot run this network"):
        test_model.export_page(model, tmp_path / "draw.html")
    assert list(tmp_path.iterdir()) == []


def test_an_activation_that_the_page_lacks_is_refused_with_the_line_to_add(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(network.ACTIVATIONS, "mish", torch.nn.Mish)
    with pytest.raises(utils.UserError, match=r"mish; add it to ACTIVATIONS in assets/draw\.html"):
        test_model.export_page(Net(activation="mish").eval(), tmp_path / "draw.html")


def test_another_ending_is_refused(refuse):
    refuse("test_model.py", "--export", "model.txt", words=["model.txt", "must end in .onnx or .html"])
