"""The page in a real browser: it works by mouse and keyboard, asks for nothing and complains of nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

by_css = "css selector"


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    resize(browser, 1200)
    prefer(browser, "light")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    return browser


def resize(browser: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(browser: Any, scheme: str) -> None:
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    media = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


def choose(browser: Any, name: str, value: str) -> None:
    browser.find_element(by_css, f"input[name={name}][value={value}]").click()


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    actions = ActionChains(browser)
    for key in keys:
        actions.send_keys(key)
    actions.perform()


def point_at(browser: Any, element: Any, x: int = 0, y: int = 0) -> None:
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    ActionChains(browser).move_to_element_with_offset(element, x, y).perform()


def requests(browser: Any) -> dict[str, str]:
    """URL -> why it was stopped before it left, or ""."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    failed = [m["params"] for m in messages if m["method"] == "Network.loadingFailed"]
    stopped = {event["requestId"]: event.get("blockedReason", "") for event in failed}
    return {event["request"]["url"]: stopped.get(event["requestId"], "") for event in sent}


def test_nothing_is_requested_and_nothing_is_said(opened: Any, page: Path) -> None:
    assert opened.title == "tiny-int8 - Octavo report"
    opened.find_element(by_css, "#more").click()
    for value in ("full", "int8", "difference", "pair"):
        choose(opened, "view", value)
    choose(opened, "rows", "worst")
    choose(opened, "figure", "fd")
    opened.find_element(by_css, "#theme").click()
    opened.find_element(by_css, ".tile").click()
    assert [url for url in requests(opened) if not url.startswith("data:")] == [page.as_uri()]
    assert opened.get_log("browser") == []


def test_the_policy_stops_whatever_would_be_requested(opened: Any) -> None:
    opened.execute_script(
        "new Image().src = 'https://example.org/a.png'; fetch('https://example.org').catch(() => 0)"
    )
    opened.execute_async_script("setTimeout(arguments[0], 200)")
    assert any("Content Security Policy" in entry["message"] for entry in opened.get_log("browser"))
    assert {why for url, why in requests(opened).items() if "example.org" in url} <= {"csp"}


@pytest.mark.parametrize("width", [400, 900, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_never_scrolls_sideways(opened: Any, width: int, scheme: str) -> None:
    resize(opened, width)
    prefer(opened, scheme)
    for details in opened.find_elements(by_css, "details"):
        opened.execute_script("arguments[0].open = true", details)
    assert opened.execute_script("return innerWidth") == width
    root = "document.documentElement"
    assert opened.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")


def test_the_theme_follows_the_system_until_it_is_chosen(opened: Any) -> None:
    def background() -> str:
        return str(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))

    prefer(opened, "dark")
    dark = background()
    prefer(opened, "light")
    light = background()
    assert dark != light
    button = opened.find_element(by_css, "#theme")
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.text, background()))
    assert seen == [("Theme: light", light), ("Theme: dark", dark), ("Theme: auto", light)]


def visible(browser: Any, tile: Any) -> list[int]:
    """Which of full precision (0), int8 (1) and difference (2) the tile shows."""
    script = (
        "return [...arguments[0].querySelectorAll('img')].map((image, i) => [getComputedStyle(image), i])"
        ".filter(([style]) => style.display !== 'none' && style.visibility !== 'hidden').map(([, i]) => i)"
    )
    return list(browser.execute_script(script, tile))


def test_images_flip_between_full_precision_and_int8(opened: Any) -> None:
    tile, heading = opened.find_element(by_css, ".tile"), opened.find_element(by_css, "h1")
    point_at(opened, heading)
    assert visible(opened, tile) == [0, 1]
    for value, alone, flipped in (("full", [0], [1]), ("int8", [1], [0]), ("difference", [2], [1])):
        choose(opened, "view", value)
        point_at(opened, heading)
        assert visible(opened, tile) == alone
        point_at(opened, tile)
        assert visible(opened, tile) == flipped
    assert opened.find_element(by_css, "#difference-scale").is_displayed()


def test_worst_pairs_come_first_and_the_order_can_be_changed(opened: Any) -> None:
    def column(name: str) -> list[float]:
        return [
            float(item.get_attribute(f"data-{name}")) for item in opened.find_elements(by_css, ".gallery li")
        ]

    assert column("psnr") == sorted(column("psnr")) and len(column("psnr")) == 30
    choose(opened, "order", "seed")
    assert column("seed") == list(range(30))
    choose(opened, "order", "worst")
    assert column("psnr") == sorted(column("psnr"))


def test_some_pairs_are_folded_away_until_asked_for(opened: Any) -> None:
    def shown() -> int:
        return sum(item.is_displayed() for item in opened.find_elements(by_css, ".gallery li"))

    more = opened.find_element(by_css, "#more")
    assert (shown(), more.get_attribute("aria-expanded")) == (24, "false")
    opened.execute_script("arguments[0].click()", more)
    assert (shown(), more.get_attribute("aria-expanded")) == (30, "true")


def test_a_closer_look_by_keyboard_alone(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    tiles = opened.find_elements(by_css, ".tile")
    opened.execute_script("arguments[0].focus()", tiles[0])
    press(opened, Keys.ENTER)
    dialog = opened.find_element(by_css, "#closer")
    title = opened.find_element(by_css, "#closer-title")
    assert dialog.is_displayed() and title.text.startswith("Seed")
    first = title.text
    press(opened, Keys.ARROW_RIGHT)
    assert title.text != first
    sources = [image.get_attribute("src") for image in dialog.find_elements(by_css, "img")]
    assert sources == [image.get_attribute("src") for image in tiles[1].find_elements(by_css, "img")]
    press(opened, Keys.ARROW_LEFT)
    assert title.text == first
    press(opened, Keys.ESCAPE)
    assert not dialog.is_displayed()


def test_everything_to_press_is_reached_by_tab(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.execute_script(
        "window.reached = []; document.addEventListener('focusin', ({target: {id, name, className}}) => "
        "window.reached.push(id || name || className))"
    )
    press(opened, Keys.TAB * 70)
    reached = set(opened.execute_script("return window.reached"))
    assert {"theme", "view", "order", "tile", "more", "cells", "rows", "figure", "loading"} <= reached


def test_the_heat_map_names_the_layer_by_pointer_and_by_keys(opened: Any, report_data: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    errors = report_data.errors
    cells, tip = opened.find_element(by_css, ".cells"), opened.find_element(by_css, ".tip")
    assert not tip.is_displayed()
    point_at(opened, cells, -cells.size["width"] // 2 + 3, -cells.size["height"] // 2 + 3)
    assert errors.layers[0] in tip.text and f"timestep {errors.timesteps[0]:g}" in tip.text
    assert f"error {100 * errors.errors[0][0]:#.3g} %" in tip.text
    opened.execute_script("arguments[0].focus()", cells)
    press(opened, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert errors.layers[1] in tip.text and f"timestep {errors.timesteps[1]:g}" in tip.text
    assert errors.layers[1] in opened.find_element(by_css, "#told").get_attribute("textContent")
    choose(opened, "rows", "worst")
    point_at(opened, cells, -cells.size["width"] // 2 + 3, -cells.size["height"] // 2 + 3)
    assert errors.layers[errors.worst[0]] in tip.text


def test_the_study_draws_the_figure_that_is_chosen(opened: Any) -> None:
    def shown() -> set[str]:
        titles = opened.find_elements(by_css, "#T4-W8A8 .head .title")
        return {title.text for title in titles if title.is_displayed()}

    assert shown() == {"PSNR to full precision, dB", "the paper\u2019s FID, 8 bits"}
    for value, title in (("fd", "FD to full precision"), ("against", "PSNR against the base row, dB")):
        choose(opened, "figure", value)
        assert title in shown() and len(shown()) == 2


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_nothing_in_the_study_overlaps(opened: Any, width: int) -> None:
    """Dots lie within their row's plot; labels, plots and figures beside each other, not on each other."""
    resize(opened, width)
    script = """
      const wrong = [];
      const box = (element) => element.getBoundingClientRect();
      for (const line of document.querySelectorAll(".dots .line:not(.head)")) {
        const cells = [...line.children].filter((cell) => box(cell).width);
        for (const a of cells) for (const b of cells) {
          const [p, q] = [box(a), box(b)];
          if (a !== b && p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
            wrong.push([a.className, b.className, line.innerText]);
        }
        for (const area of line.querySelectorAll(".area")) for (const dot of area.querySelectorAll(".dot")) {
          const [p, q] = [box(area), box(dot)];
          if (q.width && (q.left < p.left - 8 || q.right > p.right + 8)) wrong.push([dot.style.left, line.innerText]);
        }
        for (const cell of cells)
          if (cell.scrollWidth > cell.clientWidth + 1 && !cell.matches(".area")) wrong.push([cell.innerText]);
      }
      return wrong;
    """
    for value in ("psnr", "fd", "fd_real", "against"):
        choose(opened, "figure", value)
        assert opened.execute_script(script) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_dots_stand_out_from_the_paper(opened: Any, scheme: str) -> None:
    """WCAG: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    prefer(opened, scheme)

    def luminance(name: str) -> float:
        script = (
            "const probe = document.body.appendChild(document.createElement('i'));"
            f"probe.style.color = 'var(--{name})'; const found = getComputedStyle(probe).color; probe.remove();"
            "return found.match(/\\d+/g).slice(0, 3).map(Number)"
        )
        channels = [value / 255 for value in opened.execute_script(script)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = luminance("paper")
    for name, least in {"ink": 7.0, "muted": 4.5, "full": 3.0, "ours": 3.0}.items():
        bright, dark = sorted((luminance(name), paper), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= least, name


def test_the_page_is_read_without_script(opened: Any, page: Path) -> None:
    opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened.get(page.as_uri())
        assert (
            len([item for item in opened.find_elements(by_css, ".gallery li") if item.is_displayed()]) == 30
        )
        assert not opened.find_element(by_css, "#theme").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
