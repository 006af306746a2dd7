"""Debian's Chromium without a window, for pages that unmask writes."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PICTURES = Path(__file__).parent / "fixtures" / "pages"
TOLERANCE = 6.0  # mean difference of brightness of 255, on pictures an eighth as wide: letters differ, layout does not
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def chromium() -> Any:
    """Return Playwright's Chromium and the browser's path; the test is skipped where one is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs a Chromium (apt-get install chromium)")
    return api.sync_playwright, path


@contextmanager
def opened(file: Path, *, size: dict[str, int] = WIDE, scheme: str = "light", ready: bool = True) -> Iterator[Any]:
    """Open a file and yield its page; fails on an error, a warning on the console, or any request but for the file."""
    start, path = chromium()
    said: list[str] = []
    with start() as driver:
        # Containers run tests as root, where Chromium's own sandbox does not start.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--force-device-scale-factor=1"])
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: None if request.url == file.as_uri() else said.append(request.url))
        page.goto(file.as_uri())
        if ready:
            page.wait_for_selector("body[data-ready=yes]", timeout=20_000)
        yield page
        browser.close()
    assert not said, said


def until(tab: Any, expression: str, expected: Any, seconds: float = 20.0) -> None:
    """Wait until an expression of the page's has this value (its content security policy forbids Playwright's wait)."""
    end = time.monotonic() + seconds
    while (seen := tab.evaluate(expression)) != expected:
        assert time.monotonic() < end, f"{expression} is {seen!r}, not {expected!r}"
        time.sleep(0.02)


def compare(taken: bytes, name: str) -> None:
    """Compare a screenshot with the stored one; both are reduced, so that a machine's fonts make little difference."""
    image, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    path = PICTURES / name
    picture = image.open(io.BytesIO(taken)).convert("RGB")
    picture = picture.resize((picture.width // 8, picture.height // 8), image.Resampling.BOX)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        pytest.fail(f"{name} was missing; it was written, look at it")
    before = numpy.asarray(image.open(path).convert("RGB"), dtype=float)
    difference = numpy.abs(numpy.asarray(picture, dtype=float) - before).mean()
    assert difference < TOLERANCE, f"{name} differs by {difference:.1f}; delete it to store the new one"
