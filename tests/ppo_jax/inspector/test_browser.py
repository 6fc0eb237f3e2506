"""The page in a headless Chromium: clicks, hover, keys, both themes, and no request anywhere."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from ppo_jax.inspector.page import Inspection

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(NAMES)} is on the path")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        sandbox = [] if sys.platform != "linux" or os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(make_inspection: Callable[..., Inspection], tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(make_inspection(5, 40).html())
    return path


@pytest.fixture
def page(browser: Any, written: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("request", lambda request: wrong.append(request.url))
    page.goto(written.as_uri())
    yield page
    page.close()
    assert [x for x in wrong if not x.startswith(("file:", "data:"))] == []


def scores(page: Any) -> list[float]:
    texts = page.locator(".episode .facts span:first-child b").all_inner_texts()
    return [float(text.replace("−", "-")) for text in texts]


def test_sorted_as_asked(page: Any) -> None:
    assert scores(page) == [2, 1, 0, -1, -2]
    page.select_option("#sort", "score+")
    assert scores(page) == [-2, -1, 0, 1, 2]
    page.select_option("#sort", "length+")
    assert scores(page) == [2, 1, 0, -1, -2], "the higher ones are the shorter ones here"
    page.select_option("#sort", "kl-")
    sums = [float(x) for x in page.evaluate("data.episodes.map((e) => e.klSum)")]
    assert scores(page) == [i - 2.0 for i in np.argsort(sums)[::-1]]


def test_a_click_and_a_key_colour_by_another_number(page: Any) -> None:
    strength = "[...document.querySelectorAll('.t')].map((t) => t.style.getPropertyValue('--p'))"
    seen = set()
    for number, name in enumerate(page.evaluate("Object.keys(MEASURES)"), start=1):
        page.keyboard.press(str(number))
        assert page.locator(f"#measures input[value={name}]").is_checked()
        by_key = page.evaluate(strength)
        page.keyboard.press("1" if number > 1 else "2")
        page.locator("#measures label").nth(number - 1).click()
        assert page.evaluate(strength) == by_key
        assert all(0 <= float(p) <= 100 for p in by_key)
        seen.add(tuple(by_key))
        assert page.locator("#legend .ticks span").count() == 3
    assert len(seen) == 7


def test_signs_have_hues_of_their_own(page: Any) -> None:
    page.keyboard.press("3")
    for episode in range(5):
        kl = page.evaluate(f"data.episodes[{episode}].kl")
        spans = f"[...document.querySelectorAll('[data-number=\"{episode}\"] .t')]"
        hues = page.evaluate(f"{spans}.map((t) => [...t.classList].find((c) => c.length === 4))")
        assert hues == ["more" if x > 0 else "less" for x in kl]


def test_hover_shows_the_numbers_of_a_token(page: Any) -> None:
    card = page.locator("#card")
    assert card.is_hidden()
    token = page.locator("[data-number='2'] .t").nth(4)
    token.hover()
    assert card.is_visible()
    episode = page.evaluate("data.episodes[2]")
    assert f"token 5 of 38, id {episode['ids'][4]}" in card.inner_text()
    cells = card.locator(".numbers span").all_inner_texts()
    shown = dict(zip(cells[::2], cells[1::2], strict=True))
    for label, name in (("entropy", "entropy"), ("KL", "kl"), ("advantage", "advantage")):
        value = float(shown[label].replace("−", "-"))
        assert value == pytest.approx(episode[name][4], rel=0.01)
    shares = card.locator(".likely span").all_inner_texts()
    assert float(shares[1].removesuffix(" %")) == pytest.approx(100 * np.exp(-0.7), rel=0.01)
    box, width = card.bounding_box(), page.viewport_size["width"]
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    page.mouse.move(5, 5)
    assert card.is_hidden()


def test_a_click_keeps_the_card_and_escape_closes_it(page: Any) -> None:
    page.locator("[data-number='4'] .t").nth(2).click()
    page.locator("[data-number='4'] .t").nth(9).hover()
    assert "token 3 of 36" in page.locator("#card").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#card").is_hidden()


def test_the_keyboard_goes_everywhere(page: Any) -> None:
    card = page.locator("#card")
    page.keyboard.press("ArrowRight")
    assert "token 1 of 36" in card.inner_text(), "of the first episode, the highest score"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert "token 2 of 36" in card.inner_text()
    page.keyboard.press("j")
    assert "token 1 of 37" in card.inner_text()
    page.keyboard.press("k")
    assert "token 1 of 36" in card.inner_text()
    page.keyboard.press("s")
    assert scores(page) == [-2, -1, 0, 1, 2]
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()


def test_light_and_dark(page: Any, tmp_path: Path) -> None:
    def brightness() -> float:
        page.screenshot(path=tmp_path / "page.png")
        picture = imread(tmp_path / "page.png")[..., :3]
        assert picture.std() > 0.03, "it is not blank"
        return float(np.median(picture))

    assert brightness() > 0.9
    page.keyboard.press("d")
    assert brightness() < 0.2
    page.locator("#theme").click()
    assert brightness() > 0.9
    page.emulate_media(color_scheme="dark")
    assert brightness() > 0.9, "what the reader chose stays"


def test_the_charts(page: Any) -> None:
    titles = page.locator("#batch h3").all_inner_texts()
    assert [title.split()[0] for title in titles] == [
        "Score",
        "KL",
        "Length",
        "Ratio,",
        "Advantage",
        "KL",
    ]
    assert page.locator("#batch .limit").count() == 2
    assert page.locator("#curves path").count() == 2
    assert page.locator("#answers tr").count() == 4
    widest = page.evaluate("document.documentElement.scrollWidth")
    assert widest <= page.viewport_size["width"], "nothing sticks out"


def test_a_narrow_window(page: Any) -> None:
    page.set_viewport_size({"width": 420, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_turns_have_roles(
    browser: Any, make_inspection: Callable[..., Inspection], tmp_path: Path
) -> None:
    inspection = make_inspection(1, 9)
    inspection.tokens["episodes"][0]["own"] = [1, 1, 1, 0, 0, 1, 1, 1, 1]
    (tmp_path / "page.html").write_text(inspection.html())
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    roles = page.locator(".role").all_text_contents()
    assert roles == ["prompt", "assistant", "environment", "assistant"]
    page.locator(".t").nth(3).hover()
    assert "written by the environment" in page.locator("#card").inner_text()
    page.close()


def test_ten_thousand_tokens(
    browser: Any, make_inspection: Callable[..., Inspection], tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(make_inspection(1, 10_000).html())
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator(".t").count() == 10_000
    milliseconds = page.evaluate(
        "() => { const t = performance.now(); colour('entropy'); document.body.offsetHeight;"
        " return performance.now() - t; }"
    )
    assert milliseconds < 5_000
    page.close()
