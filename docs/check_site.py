"""Looks at the built site in a real browser: every page on a desktop and on a phone, and the search.

    make docs
    apt-get install chromium chromium-driver && pip install selenium
    python docs/check_site.py [SITE] [--shots FOLDER]

An error is: a message on the console, a request that fails or goes to another host, a page that is wider than the
screen, a picture that does not load, a search that does not find a method. The pages are read from files, without a
server, as anyone does who unpacks the site; the search must work there too. Look at the screenshots afterwards.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys


ROOT = Path(__file__).resolve().parent.parent
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SEARCHED = {"butterfly": "BOFT", "Householder": "HRA", "estimate_memory": "Tools"}
"""What is typed -> what one of the titles found must hold."""

SHOWN = ("index", "methods", "methods/lora", "pictures", "concepts", "architecture", "api/index", "guides/troubles")
"""Pages of which screenshots are kept, in the light and in the dark theme."""

STATE = """
const wide = document.scrollingElement.scrollWidth - window.innerWidth;
const shown = [...document.images].filter(i => i.offsetParent && i.loading !== 'lazy');
const broken = shown.filter(i => !i.naturalWidth).map(i => i.src);
const away = performance.getEntriesByType('resource').map(e => e.name).filter(n => !/^(file|blob|data):/.test(n));
return {wide, broken, away};
"""


def browser(size: str) -> webdriver.Chrome:
    """A browser without a window; on the phone's size it also says that it is one."""
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(argument)
    width, height = SIZES[size]
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if size == "phone":
        metrics = {"width": width, "height": height, "pixelRatio": 2.0, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.binary_location = "/usr/bin/chromium"
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


def faults(driver: webdriver.Chrome, page: Path) -> Iterator[str]:
    """What is wrong with a page, once it is loaded."""
    driver.get(page.as_uri())
    state: dict[str, Any] = driver.execute_script(STATE)
    if state["wide"] > 0:
        yield f"wider than the screen by {state['wide']} px"
    yield from (f"picture not loaded: {source}" for source in state["broken"])
    yield from (f"asks another host: {source}" for source in state["away"])
    for entry in driver.get_log("browser"):
        if entry["level"] in ("WARNING", "SEVERE"):
            yield f"console: {entry['message'][:300]}"


def searched(driver: webdriver.Chrome, home: Path, shot: Path | None) -> Iterator[str]:
    """What the search box does not find."""
    for text, wanted in SEARCHED.items():
        driver.get(home.as_uri())
        opener = driver.find_element(By.CSS_SELECTOR, ".md-header label[for=__search]")
        box = driver.find_element(By.CSS_SELECTOR, ".md-search__input")
        (opener if opener.is_displayed() else box).click()
        time.sleep(0.5)
        titles: list[str] = []
        for _ in range(50):  # the index is read and built first
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(text)
            time.sleep(0.2)
            found = driver.find_elements(By.CSS_SELECTOR, ".md-search-result__item h1, .md-search-result__item h2")
            titles = [title.get_attribute("textContent") or "" for title in found]
            if titles:
                break
        if not any(wanted in title for title in titles):
            yield f"search for {text!r} gives {titles}, not {wanted}"
        elif shot is not None:
            driver.save_screenshot(str(shot))


def main(argv: list[str] | None = None) -> int:
    """Look at all pages; returns the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", nargs="?", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--shots", type=Path, default=ROOT / "build" / "shots", help="folder of the screenshots")
    options = parser.parse_args(argv)
    site = options.site.resolve()
    pages = sorted(page for page in site.rglob("*.html") if page.name != "404.html")
    options.shots.mkdir(parents=True, exist_ok=True)
    count = 0
    for size in SIZES:
        driver = browser(size)
        try:
            for page in pages:
                name = page.relative_to(site).with_suffix("").as_posix()
                for fault in faults(driver, page):
                    count += 1
                    print(f"{size}, {name}: {fault}")
                if name in SHOWN:
                    for theme in ("default", "slate"):
                        driver.execute_script(f"document.body.setAttribute('data-md-color-scheme', '{theme}')")
                        time.sleep(0.3)
                        driver.save_screenshot(str(options.shots / f"{name.replace('/', '-')}-{size}-{theme}.png"))
            for fault in searched(driver, site / "index.html", options.shots / f"search-{size}.png"):
                count += 1
                print(f"{size}, {fault}")
        finally:
            driver.quit()
    print(f"{len(pages)} pages in {len(SIZES)} sizes: {count} faults; screenshots in {options.shots}")
    return count


if __name__ == "__main__":
    sys.exit(bool(main()))
