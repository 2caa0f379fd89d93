"""The picture of the gallery in the documentation, taken from a server that runs.

On an otherwise idle machine, because the picture shows times:

    cspd-run serve &
    python tests/runtime/serve/gallery_picture.py docs/evidence/gallery.png
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from browsing import SETTLE, open_browser, resize
from selenium.webdriver.support.ui import WebDriverWait

COMPARE = """
document.querySelector("#seed").value = "{seed}";
document.querySelector("#lock").checked = true;
document.querySelector("#class-chips input[value='{label}']").click();
document.querySelector("#compare").click();
"""
IDLE = """return document.querySelector("#stage").ariaBusy === "false"
    && document.querySelectorAll(".card .tools:not([hidden])").length === {cards}"""
HEIGHT = "return document.documentElement.scrollHeight"


def take(url: str, out: Path, *, width: int = 1280, dark: bool = False, label: str = "boot",
         seed: int = 5) -> None:  # fmt: skip
    """Compare all methods at `url` and write the whole page to `out` as PNG."""
    with open_browser() as driver:
        wait = WebDriverWait(driver, 120)
        resize(driver, width, 900, dark)
        driver.get(url)
        wait.until(lambda _: driver.execute_script(IDLE.format(cards=1)))
        driver.execute_script(COMPARE.format(seed=seed, label=label))
        wait.until(lambda _: driver.execute_script(IDLE.format(cards=5)))
        driver.execute_script("document.querySelector('#shelf').hidden = true; scrollTo(0, 0)")
        resize(driver, width, driver.execute_script(HEIGHT), dark)
        driver.execute_script(SETTLE)
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    out.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--width", type=int, default=1280, help="below 600: as a phone shows it")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    take(options.url, options.out, width=options.width, dark=options.dark)


if __name__ == "__main__":
    main()
