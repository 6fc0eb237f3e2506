"""The page without a browser: its parts, its size, what is in it, and its colours."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

from ppo_jax.inspector.page import MAX_BYTES, Inspection, RunRecords

Make = Callable[..., Inspection]


class Page(HTMLParser):
    """Elements, ids, and the contents of scripts and styles by id or name."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, str] = {}
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._inside = attributes.get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.content[self._inside] = self.content.get(self._inside, "") + data

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.content["data"])
        return data


def test_all_that_it_shows_is_inside(make_inspection: Make) -> None:
    """A model may write what ends a script: it stays text."""
    inspection = make_inspection(4, 30)
    page = Page(inspection.html())
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert page.data["episodes"] == inspection.tokens["episodes"]
    assert any("</script>" in episode["text"] for episode in page.data["episodes"])
    assert page.data["batch"] == inspection.tokens["batch"]
    histograms = page.data["distributions"]["histograms"]
    assert [(h["title"][:5], h["counts"], len(h["edges"])) for h in histograms] == [
        ("Ratio", list(range(40)), 41),
        ("Advan", list(range(40)), 41),
    ]
    assert histograms[0]["limits"] == [0.8, 1.2]
    assert page.data["facts"] == [["score", pytest.approx(4.0)]]
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,", tag
    for part in ("style", "script"):
        assert not re.search(
            r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page.content[part]
        )


def test_the_script_finds_its_elements(make_inspection: Make) -> None:
    page = Page(make_inspection(1, 5).html())
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert set(re.findall(r'\$\("(\w+)"\)', page.content["script"])) <= ids


def test_names_are_escaped(make_inspection: Make) -> None:
    html = make_inspection(1, 5, run=RunRecords("<b>runs"), other=None).html()
    assert "<title>&lt;b&gt;runs, iteration 40</title>" in html
    assert "<b>runs" not in html
    assert Page(html).data["runs"] == ["<b>runs"]


def test_ten_thousand_tokens_fit(make_inspection: Make) -> None:
    html = make_inspection(1, 10_000).html()
    assert len(html.encode()) < MAX_BYTES
    assert len(Page(html).data["episodes"][0]["text"]) == 10_000
    assert "left out" not in Page(html).data["note"]


def test_what_has_no_room_is_left_out_and_told_of(make_inspection: Make) -> None:
    """The lowest and the highest score stay."""
    html = make_inspection(8, 6_000).html()
    assert len(html.encode()) < MAX_BYTES
    data = Page(html).data
    scores = [episode["score"] for episode in data["episodes"]]
    assert 2 <= len(scores) < 8
    assert (scores[0], scores[-1]) == (-2, 5)
    assert scores == sorted(scores)
    assert f"{8 - len(scores)} more are left out, so that the page stays below 5 MB" in data["note"]


def test_two_runs(make_inspection: Make) -> None:
    data = Page(make_inspection(1, 5).html()).data
    assert data["runs"] == ["runs/mine", "runs/other"]
    [curve] = data["curves"]
    assert [points[-1] for points in curve["series"]] == [[60, 6.0], [60, 12.0]]
    [answer] = data["answers"]
    assert answer["prompt"] == "The plot", "the others are not common to both"
    assert [(row["run"], row["decoding"], row["completion"]) for row in answer["rows"]] == [
        (number, decoding, f" was {name} at 60")
        for decoding in ("greedy", "sampled")
        for number, name in enumerate(data["runs"])
    ]


def test_one_run_has_curves_and_no_answers(make_inspection: Make) -> None:
    data = Page(make_inspection(1, 5, other=None).html()).data
    assert len(data["curves"]) == 1
    assert data["answers"] == []


def test_long_curves_are_thinned_out(make_inspection: Make) -> None:
    metrics = [{"iteration": i, "objective/score": float(i)} for i in range(1, 10_001)]
    data = Page(make_inspection(1, 5, run=RunRecords("x", metrics), other=None).html()).data
    [points] = data["curves"][0]["series"]
    assert len(points) <= 301
    assert (points[0], points[-1]) == ([1, 1.0], [10_000, 10_000.0])


def test_a_notebook_shows_the_page(make_inspection: Make) -> None:
    inspection = make_inspection(2, 5)
    [(tag, attributes)] = Page(inspection._repr_html_()).elements
    assert tag == "iframe"
    assert attributes["srcdoc"] == inspection.html()


def test_text_can_be_read_on_every_colour() -> None:
    """At full strength the hues leave WCAG's contrast of 4.5 to the text, in light and in dark."""
    css = (files("ppo_jax.inspector") / "page.css").read_text()
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", css)
    for theme in (0, 1):
        colours = {name: pair[theme] for name, *pair in pairs}
        for ground in ("paper", "raised", "size", "more", "less"):
            assert contrast(colours["ink"], colours[ground]) >= 4.5, (ground, theme)
        for ground in ("paper", "raised"):
            assert contrast(colours["quiet"], colours[ground]) >= 4.5, (ground, theme)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (L + 0.05) / (l + 0.05), of relative luminances L above l."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
