"""The report of `gpu-engine tune`: its scales, and the page as a browser shows it."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, FloatRect, Locator, Page, sync_playwright

from gpu_engine.tools.axes import linear_axis, log_axis
from gpu_engine.tools.report import chart, page
from tests.tuning import Costs, tuned

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.9], (0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        ([412], (0, 100, 200, 300, 400, 500)),
        ([7300, 20], (0, 2000, 4000, 6000, 8000)),
    ],
)
def test_a_linear_axis_has_few_round_ticks(values: list[float], ticks: tuple[float, ...]) -> None:
    axis = linear_axis(values)
    assert axis.ticks == pytest.approx(ticks) and axis.place(0) == 0 and axis.place(axis.high) == 100


@pytest.mark.parametrize("values", [[3.0], [1.4, 88.0], [0.02, 900.0]])
def test_a_logarithmic_axis_holds_all_values_between_its_ends(values: list[float]) -> None:
    axis = log_axis(values)
    assert all(0 < axis.place(value) < 100 for value in values)
    assert all(0 <= axis.place(tick) <= 100 for tick in axis.ticks)
    assert axis.place((axis.low * axis.high) ** 0.5) == pytest.approx(50)


def test_every_measurement_is_a_dot_and_one_is_chosen() -> None:
    found = tuned()
    dots = [dot for series in chart(found).series for dot in series.dots]
    assert len(dots) == len(found.found.measured)
    assert [dot.measured for dot in dots if dot.chosen] == [found.found.chosen]
    assert {dot.kept for dot in dots} == {True, False}
    assert all(0 <= dot.left <= 100 and 0 <= dot.bottom <= 100 for dot in dots)


@pytest.mark.parametrize("bound_ms", [None, 60.0, 0.001])
def test_the_page_is_one_small_file_that_loads_nothing(bound_ms: float | None) -> None:
    text = page(tuned(bound_ms))
    assert not re.search(r"https?://|\ssrc=|@import|url\(|<link[^>]*href=\"(?!data:)", text)
    assert len(text.encode()) < 60_000 and "{{" not in text
    assert ("No measured point keeps" in text) == (bound_ms == 0.001)
    slow = {None: set(), 60.0: {"too slow"}, 0.001: {"too slow", "chosen, too slow"}}[bound_ms]
    assert set(re.findall(r'<td class="remark">([^<]*)<', text)) - {"", "chosen"} == slow


def test_names_are_escaped() -> None:
    found = tuned()
    object.__setattr__(found.tuning, "model", Path("<script>alert(1)</script>.onnx"))
    assert "<script>alert" not in page(found)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(params=[(1280, "light"), (400, "dark")], ids=["wide light", "narrow dark"])
def shown(request: pytest.FixtureRequest, browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The page in a window; whatever the console said fails the test."""
    width, scheme = request.param
    file = tmp_path / "report.html"
    file.write_text(page(tuned()), encoding="utf-8")
    window = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith("file:") else None)
    window.goto(file.as_uri())
    yield window
    window.close()
    assert [line for line in said if not line.startswith("data:")] == []


def box_of(place: Locator) -> FloatRect:
    box = place.bounding_box()
    assert box is not None, f"{place} is not drawn"
    return box


def test_the_chart_is_drawn_and_tells_values_on_hover(shown: Page) -> None:
    plot = box_of(shown.locator("#plot"))
    assert plot["width"] > 300 and plot["height"] > 300
    lines = shown.locator(".lines polyline").all()
    assert len(lines) == len(chart(tuned()).series) and all(box_of(line)["width"] > 1 for line in lines)
    points = [box_of(point) for point in shown.locator(".point").all()]
    assert len(points) == len(tuned().found.measured)
    assert all(plot["x"] - 12 <= box["x"] <= plot["x"] + plot["width"] - 12 for box in points)
    chosen, tip = shown.locator(".point.chosen"), shown.locator(".point.chosen .tip")
    assert not tip.is_visible()
    chosen.hover()
    assert tip.is_visible()
    told = "4 streams, 2 threads each batch 16 in flight 128 items/s 3,292 p99 46.7 ms median 38.9 ms"
    assert " ".join(tip.inner_text().split()) == told


def test_nothing_is_cut_off(shown: Page) -> None:
    """No sideways scrolling, every tip inside the window, text of at least 12 px, ticks that do not overlap."""
    width = shown.viewport_size["width"]  # type: ignore[index]
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    shown.add_style_tag(content=".tip { display: block !important }")
    tips = shown.locator(".tip").all()
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in map(box_of, tips))
    texts = "[...document.querySelectorAll('p, td, th, dt, dd, li, .tick')]"
    assert min(shown.evaluate(f"{texts}.map(each => parseFloat(getComputedStyle(each).fontSize))")) >= 12
    assert all(box_of(tick)["x"] >= 0 for tick in shown.locator(".tick.y").all())
    ticks = [box_of(tick) for tick in shown.locator(".tick.x").all()]
    assert all(one["x"] + one["width"] < other["x"] for one, other in itertools.pairwise(ticks))


def test_long_numbers_have_room(browser: Browser) -> None:
    window = browser.new_page(viewport={"width": 400, "height": 900})
    window.set_content(page(tuned(0.06, Costs(call_ms=0.004, row_ms=0.0001))))
    top = window.locator(".tick.y").last
    assert top.inner_text() == "40,000,000" and box_of(top)["x"] >= 0
    assert window.evaluate("document.documentElement.scrollWidth") <= 400
    window.close()


def test_points_are_reached_by_keyboard(shown: Page) -> None:
    shown.locator(".point").first.focus()
    shown.keyboard.press("ArrowRight")
    first = shown.evaluate("document.activeElement.getAttribute('aria-label')")
    shown.keyboard.press("ArrowRight")
    second = shown.evaluate("document.activeElement.getAttribute('aria-label')")
    assert "items a second" in first and "items a second" in second and first != second
    assert shown.locator(".point:focus .tip").is_visible()
    shown.keyboard.press("Escape")
    assert shown.locator(".point:focus").count() == 0


def test_colours_follow_the_scheme_and_can_be_read(shown: Page) -> None:
    """Contrast as WCAG counts it: 4.5 for text, 3 for points on the page."""
    dark = shown.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")

    def colour(selector: str, name: str) -> list[float]:
        text = shown.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}")
        return [float(part) / 255 for part in re.findall(r"[\d.]+", text)[:3]]

    def luminance(rgb: list[float]) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: list[float], other: list[float]) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    ground = colour("body", "backgroundColor")
    assert (luminance(ground) < 0.1) is dark
    for selector in ("body", ".hint", ".tick", ".bound-name", ".figures dt"):
        assert contrast(colour(selector, "color"), ground) >= 4.5, selector
    for number in range(len(chart(tuned()).series)):
        point = f".point.series-{number}"
        assert contrast(colour(point, "borderTopColor"), ground) >= 3
        assert contrast(colour(point, "color"), colour(point, "backgroundColor")) >= 4.5
