"""The gallery in a real browser, headless: errors, keyboard, generate, compare, layouts."""

import shutil

import pytest
from running_server import KEY
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
TRACES = ("favicon", "401", "422")  # what the browser itself logs about refused requests


class Page:
    """The page by what a person sees and does."""

    def __init__(self, driver, url: str) -> None:
        self.driver = driver
        driver.get(url)

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition, seconds: float = 20) -> None:
        WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def idle(self) -> None:
        self.until(lambda: self.find("#stage").get_attribute("aria-busy") == "false")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


@pytest.fixture(scope="module")
def page(server):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        opened = Page(driver, server.url)
        opened.size(1280, 900)
        yield opened
    finally:
        driver.quit()


def test_without_a_key_the_page_asks_for_it(page):
    page.until(lambda: page.find("#error").is_displayed())
    assert "key is needed" in page.find("#error").text
    assert page.find("#error").get_attribute("role") == "alert"
    page.find("#key").send_keys(KEY, Keys.TAB)
    page.until(lambda: len(page.all("#class-chips input")) == 10)
    assert not page.find("#error").is_displayed()
    assert len(page.all(".card .cell")) == 49


def test_an_error_is_shown_with_its_id(page):
    page.find("summary").click()
    page.find("#num_iter").send_keys("50")
    page.find("#generate").click()
    page.until(lambda: page.find("#error").is_displayed())
    assert "expected 1..49" in page.find("#error").text
    assert len(page.find("#error small").text) == len("id ") + 32
    assert page.find(".card .verdict").text == "not finished"
    page.find("#num_iter").clear()


def test_generate_with_the_keyboard_alone(page):
    for field, value in (("num_iter", "10"), ("head_steps", "10"), ("seed", "21")):
        page.find(f"#{field}").clear()
        page.find(f"#{field}").send_keys(value)
    page.find("#class-chips input:checked").send_keys(Keys.ARROW_RIGHT)
    assert page.find("#class-chips input:checked").get_attribute("value") == "bag"
    page.find("#seed").send_keys(Keys.ENTER)
    page.until(lambda: page.all("#thumbs button"))
    page.idle()
    assert not page.find("#error").is_displayed()
    counts = {kind: len(page.all(f".map .{kind}")) for kind in ("accepted", "rejected", "exact")}
    assert sum(counts.values()) == 49
    assert counts["accepted"] and counts["rejected"]
    judged = counts["accepted"] + counts["rejected"]
    shown = page.find(".rate").text
    assert shown == f"{100 * counts['accepted'] / judged:.0f} %"
    image = page.find(".canvas img")
    assert image.get_property("naturalWidth") == 28 and image.get_attribute("alt") == (
        "bag, made with cspd"
    )
    label = page.find(".map").get_attribute("aria-label")
    assert label.startswith(f"49 of 49 tokens, {counts['accepted']} accepted")
    assert "cspd finished in" in page.find("#status").get_attribute("textContent")
    assert page.find("#status").get_attribute("aria-live") == "polite"


def test_compare_puts_three_methods_side_by_side(page):
    page.find("#compare").click()
    page.until(lambda: page.find(".card:nth-child(3) .verdict b").text if page.all(
        ".card:nth-child(3) .verdict b") else False)  # fmt: skip
    page.idle()
    cards = page.all(".card")
    assert [card.get_attribute("data-method") for card in cards] == ["target", "cspd", "lossless"]
    seconds = [float(card.find_element(By.CSS_SELECTOR, ".time").text[:-2]) for card in cards]
    for card, own in list(zip(cards, seconds, strict=True))[1:]:
        ratio = float(card.find_element(By.CSS_SELECTOR, ".verdict b").text[:-1])
        assert ratio == pytest.approx(seconds[0] / own, abs=0.02 + 0.01 / own)
    tops = {card.location["y"] for card in cards}
    assert len(tops) == 1


def test_fits_a_phone_and_the_dark(page):
    page.size(390, 844)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    assert len({card.location["y"] for card in page.all(".card")}) == 3
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = page.driver.execute_script(colour)
    page.size(1280, 900, dark=True)
    assert page.driver.execute_script(colour) != light


def test_nothing_broke_in_the_console(page):
    """No script error, nothing refused by the content security policy."""
    entries = [entry["message"] for entry in page.driver.get_log("browser")]
    assert [text for text in entries if not any(known in text for known in TRACES)] == []
