"""A headless Chromium that opens a page from disk, as a reader would; the test skips where there is none."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # as root, as in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--window-size=1280,900",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no network: a page that fetched anything would log an error
)


@contextlib.contextmanager
def browser(scheme: str = "light") -> Iterator:
    """A selenium driver that prefers the colour scheme "light" or "dark"."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        window.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        yield window
    finally:
        window.quit()


def open_page(window, path: Path) -> dict:
    """Opens a file and measures what a reader would see."""
    window.get(path.resolve().as_uri())
    found = window.execute_script(
        """
        const box = x => x.getBoundingClientRect();
        const figures = [...document.querySelectorAll('figure')];
        return {
          title: document.title,
          text: document.body.innerText,
          figures: Object.fromEntries(figures.map(f => [f.id, [box(f).width, box(f.querySelector('svg')).height,
            f.querySelectorAll('svg path').length, f.querySelector('svg').textContent]])),
          overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
          outside: [...document.querySelectorAll('[src], link[href]')].map(x => x.src || x.href)
            .filter(x => !x.startsWith('data:')),
          background: getComputedStyle(document.body).backgroundColor,
          ink: getComputedStyle(document.body).color,
          axis: getComputedStyle(document.querySelector('figure svg text')).fill,
          wrong: [...document.querySelectorAll('li.wrong')].map(x => x.innerText),
        };
        """
    )
    found["console"] = window.get_log("browser")
    return found
