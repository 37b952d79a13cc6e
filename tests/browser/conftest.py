"""Chromium, where there is one: else every test that asks for it says so and is skipped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Chromium refuses to isolate pages of the superuser, as in a container.
ARGUMENTS = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []


@pytest.fixture(scope="module")
def chromium():
    """Return what starts Chromium: the system's or that of playwright."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install -e .[browser]"
    )
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome")
        found = [path for name in names if (path := shutil.which(name))]
        found += [own] if Path(own).exists() else []
        if not found:
            pytest.skip("no Chromium: `apt install chromium` or `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=found[0], args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, request):
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(1000 * 60)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{request.node.name}.png")
    page.close()
