"""A real browser for the tests of pages, headless: Chromium by its driver."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")


@contextmanager
def open_browser() -> Iterator[webdriver.Chrome]:
    """A browser, closed at the end; skips the test where there is none."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver: webdriver.Chrome, width: int, height: int, dark: bool = False) -> None:
    """The screen: its size in pixels, a phone below 600, and whether it is dark."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def faint(driver: webdriver.Chrome) -> list[str]:
    """Texts on the page with less contrast than WCAG 2.2, 1.4.3 asks: 4.5:1, large ones 3:1."""
    return driver.execute_script(SETTLE + FAINT)


# Colours are read, and pictures taken, where transitions end, not on the way there.
SETTLE = """
for (const motion of document.getAnimations())
  if (Number.isFinite(motion.effect.getComputedTiming().endTime)) motion.finish();
"""
FAINT = """
const box = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const known = new Map();
const channels = (colour) => {
  if (known.has(colour)) return known.get(colour);
  box.clearRect(0, 0, 1, 1);
  box.fillStyle = colour;
  box.fillRect(0, 0, 1, 1);
  const found = [...box.getImageData(0, 0, 1, 1).data];
  known.set(colour, found);
  return found;
};
const light = (rgb) => {
  const linear = rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2];
};
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = channels(getComputedStyle(node).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255];
};
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
while (walker.nextNode()) {
  const text = walker.currentNode, node = text.parentElement;
  if (!text.data.trim() || !node.getClientRects().length) continue;
  seen += 1;
  const style = getComputedStyle(node), size = parseFloat(style.fontSize);
  const big = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const [high, low] = [light(channels(style.color)), light(ground(node))].sort((a, b) => b - a);
  const ratio = (high + .05) / (low + .05);
  if (ratio >= (big ? 3 : 4.5)) continue;
  found.push(`${ratio.toFixed(2)} ${node.tagName} ${text.data.trim()}`);
}
if (!seen) throw new Error("no text on the page");
return found;
"""
