"""The page of ``advbench report --html`` in a real browser.

Needs Chromium or Chrome and the Python package playwright: ``apt-get install chromium`` (or
``playwright install chromium``) and ``pip install -e .[dev]``. Without them the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluations import WRONG, N, curve, results, write

from advbench.report import page as pages
from advbench.report.collection import find

api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.browser

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"

CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = (rgb) => rgb
    .map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(getComputedStyle(e).backgroundColor);
    return layers.reverse().reduce((under, c) => over(rgba(c), under), [255, 255, 255]);
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const svg = element.closest("svg");
    const under = ground(element);
    let worst = under;
    if (svg && element.tagName === "text") {
      // A number of a heat map stands on its square.
      const box = element.getBoundingClientRect();
      const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
      for (const path of svg.querySelectorAll("path")) {
        const fill = getComputedStyle(path);
        const area = path.getBoundingClientRect();
        const inside = area.left < x && x < area.right && area.top < y && y < area.bottom;
        if (fill.fill !== "none" && inside && area.width < 200 && !path.closest("defs")) {
          const colour = rgba(fill.fill);
          worst = over([...colour.slice(0, 3), colour[3] * fill.fillOpacity], worst);
        }
      }
    }
    const colour = over(rgba(svg ? style.fill : style.color), worst);
    const [a, b] = [light(colour), light(worst)].sort((p, q) => q - p);
    found.push([(a + 0.05) / (b + 0.05), walk.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}
"""


def program() -> str | None:
    """A browser on this machine."""
    named = [os.environ.get("CHROMIUM"), *map(shutil.which, PROGRAMS)]
    return next((path for path in named if path), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        path = program() or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no browser: apt-get install chromium")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with all there is: two threats, seeds, a sweep, curves, images, a verdict."""
    folder = tmp_path_factory.mktemp("runs")
    found, sign = results("net"), {"id": "masking", "why": "w", "value": 1, "threshold": 0.5}
    sign |= {"class": "evidence", "kind": "search", "question": "number", "triggered": True}
    verdict = {"label": "inconclusive", "indicators": [sign]}
    write(folder / "a", replace(found, verdict=verdict), images=True)
    write(folder / "b", results("worse", lost=(N - WRONG - 4,)), bare=True)
    most = results("short", lost=(0, 0), missing=("second",))
    write(folder / "short", most, bare=True)
    write(folder / "l2", results("other", threat={"norm": "l2", "eps": 0.5}), bare=True)
    write(folder / "c1", curve("net", 0.9, 0.5), bare=True)
    write(folder / "c2", curve("worse", 0.8, 0.2), bare=True)
    for jump in (0.0, 0.5, 1.0):
        settings = {**found.settings, "defense": "jumprelu", "defense.jump": jump}
        name = "a-very-long-name-of-a-model-that-somebody-gave+jumprelu"
        write(folder / f"j{jump}", results(name, settings=settings), bare=True)
    page = folder / "page.html"
    page.write_text(pages.page(find([folder])), encoding="utf-8")
    return page.as_uri()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    """The page at 1280 pixels. Whatever it reports or asks for is a failure."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield from _watched(context, address)


def _watched(context: Any, address: str) -> Iterator[Any]:
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]


def names(page: Any) -> list[list[str]]:
    """Models that can be seen, by body of the table."""
    bodies = page.locator("#board tbody").all()
    return [
        [name for name in body.locator("tr.run:visible .name").all_inner_texts()] for body in bodies
    ]


def test_sorting(opened: Any) -> None:
    (first,) = [group for group in names(opened) if "worse" in group and len(group) > 2]
    assert first[-2:] == ["worse", "short"]  # by robust accuracy, the best first
    finished = first[:-1]  # what is not stays below
    where = names(opened).index(first)
    heading = opened.get_by_role("columnheader", name="Robust")
    assert heading.get_attribute("aria-sort") == "descending"
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert names(opened)[where][0] == "worse"
    model = opened.get_by_role("columnheader", name="Model")
    model.get_by_role("button").focus()
    opened.keyboard.press("Enter")
    assert model.get_attribute("aria-sort") == "ascending"
    assert heading.get_attribute("aria-sort") == "none"
    assert names(opened)[where] == [*sorted(finished), "short"]
    opened.keyboard.press("Enter")
    assert names(opened)[where] == [*sorted(finished, reverse=True), "short"]


def test_filters(opened: Any) -> None:
    total = sum(map(len, names(opened)))
    shown = opened.locator("#shown")
    assert shown.inner_text() == f"{total} of {total}" and total == 9
    opened.get_by_label("Defense", exact=True).select_option("jumprelu")
    assert shown.inner_text() == "3 of 9"
    assert opened.locator("#board .group:visible").count() == 1
    opened.get_by_label("Search").fill("jump 0.5")
    assert shown.inner_text() == "1 of 9"
    opened.get_by_label("Search").fill("nothing of the kind")
    assert shown.inner_text() == "0 of 9" and sum(map(len, names(opened))) == 0
    opened.get_by_label("Search").fill("")
    opened.get_by_label("Defense", exact=True).select_option("")
    opened.get_by_label("Threat", exact=True).select_option("l2 0.5")
    assert [group for group in names(opened) if group] == [["other"]]


def test_details_open(opened: Any) -> None:
    row = opened.locator("#board tr.run", has_text="net").first
    target = row.locator("a").get_attribute("href")
    assert opened.locator("details.run[open]").count() == 0
    row.locator("a").click()
    opened.wait_for_selector(f"{target}[open]")
    assert opened.locator(f"{target} svg").first.is_visible()
    opened.locator(f"{target} > summary").focus()
    opened.keyboard.press("Enter")
    assert opened.locator("details.run[open]").count() == 0


def test_copy(opened: Any) -> None:
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    block = opened.locator(".code").first
    block.get_by_role("button").click()
    opened.wait_for_function("document.querySelector('.code .copy').textContent === 'Copied'")
    copied = opened.evaluate("navigator.clipboard.readText()")
    assert copied == block.locator("code").inner_text()
    assert copied.startswith("advbench eval ")


def test_images_are_drawn(opened: Any) -> None:
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    sizes = opened.evaluate("[...document.images].map((i) => [i.naturalWidth, i.naturalHeight])")
    assert len(sizes) == 18 and all(size == [8, 8] for size in sizes)
    boxes = opened.evaluate(
        "[...document.querySelectorAll('svg')].map((s) => s.getBBox()).map((b) => b.width)"
    )
    assert len(boxes) >= 12 and min(boxes) > 150


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reads_well(browser: Any, address: str, width: int, scheme: str) -> None:
    """Nothing sticks out, and every word stands out, with everything open."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=1
    )
    for page in _watched(context, address):
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) > 384) == (scheme == "light")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 300
        low = [(round(ratio, 2), text) for ratio, text in ratios if ratio < 4.5]
        assert low == []
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg text')].map((t) => [t, t.getScreenCTM()])"
            ".map(([t, m]) => Math.hypot(m.a, m.b) * parseFloat(getComputedStyle(t).fontSize))"
        )
        assert min(sizes) > 8.5  # pixels


def test_theme_is_kept(opened: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    before = opened.evaluate(ground)
    button = opened.get_by_role("button", name="Switch colour theme")
    assert button.inner_text() == "Dark"
    button.click()
    assert opened.evaluate(ground) != before and button.inner_text() == "Light"
    stored = opened.evaluate("localStorage.getItem('advbench-theme')")
    assert stored == "dark"
    button.click()
    assert opened.evaluate(ground) == before


def test_hostile_results_run_nothing(browser: Any, tmp_path: Path) -> None:
    """Scripts in every string of a result are words; and were one to slip in, it would not run."""
    folder = write(tmp_path / "a", results(), images=True)
    values = json.loads((folder / "results.json").read_text())
    del values["checksum"]

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        fixed = key in ("schema", "norm", "sha256")
        return HOSTILE if isinstance(value, str) and not fixed else value

    (folder / "results.json").write_text(json.dumps(poison(values)))
    text = pages.page(find([tmp_path]))
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    for opened in _watched(browser.new_context(), page.as_uri()):
        opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert opened.locator("#board").inner_text().count("window.hacked") > 0
        assert opened.evaluate("window.hacked") is None
        assert opened.evaluate("document.images.length") == 18
    slipped = text.replace("</main>", f"</main>{HOSTILE.removeprefix('</script>')}")
    assert slipped != text
    page.write_text(slipped, encoding="utf-8")
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(page.as_uri())
    assert opened.evaluate("window.hacked") is None  # the page's policy
    assert opened.evaluate("document.images.length") == 19
    context.close()
