"""The gallery in a real browser, headless: errors, keyboard, seeds, stop, compare, layouts."""

import base64

import pytest
from browsing import faint, open_browser, resize
from click.testing import CliRunner
from running_server import KEY
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from cspd.runtime.commands.cli import main

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

    def execute(self, script: str) -> None:
        self.driver.execute_script(script)

    def focus(self) -> str:
        return self.driver.switch_to.active_element.get_attribute("id")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        resize(self.driver, width, height, dark)


@pytest.fixture(scope="module")
def page(server):
    with open_browser() as driver:
        opened = Page(driver, server.url)
        opened.size(1280, 900)
        yield opened


def test_without_a_key_the_page_asks_for_it_then_draws_an_image(page):
    page.until(lambda: page.find("#error").is_displayed())
    assert "key is needed" in page.find("#error").text
    assert page.find("#error").get_attribute("role") == "alert"
    page.find("#key").send_keys(KEY, Keys.TAB)
    page.until(lambda: len(page.all("#class-chips input")) == 10)
    assert not page.find("#error").is_displayed()
    assert len(page.all(".card .cell")) == 49
    page.until(lambda: page.all("#thumbs button"))
    page.idle()
    assert page.find(".canvas img").get_property("naturalWidth") == 28
    assert page.find("#seed").get_property("value") == "7"


def test_bounds_come_from_the_server(page, server):
    (model,) = server.get("/v1/models").json()["data"]
    for field in ("n", "num_iter", "head_steps", "cfg", "gamma", "window"):
        bound = model["bounds"][field]
        assert page.find(f"#{field}").get_property("min") == f"{bound['min']}"
        assert page.find(f"#{field}").get_property("max") == f"{bound['max']}"


def test_an_error_stands_at_its_field_in_the_words_of_the_server(page):
    page.execute("document.querySelector('details').open = false")
    page.execute("document.querySelector('#num_iter').value = 50")
    page.find("#generate").click()
    page.until(lambda: page.find("#num_iter-problem").is_displayed())
    assert page.find("#num_iter-problem").text == "num_iter is 50, expected 1..49 for this bundle"
    assert page.focus() == "num_iter"
    assert page.find("#num_iter").get_attribute("aria-invalid") == "true"
    assert page.find("#num_iter").get_attribute("aria-describedby") == "num_iter-problem"
    assert page.find(".card .verdict").text == "not finished"
    page.find("#num_iter").clear()


def test_generate_with_the_keyboard_alone(page):
    for field, value in (("num_iter", "10"), ("head_steps", "10"), ("seed", "21")):
        page.find(f"#{field}").clear()
        page.find(f"#{field}").send_keys(value)
    page.find("#class-chips input:checked").send_keys(Keys.ARROW_RIGHT)
    assert page.find("#class-chips input:checked").get_attribute("value") == "bag"
    page.find("#seed").send_keys(Keys.ENTER)
    page.until(lambda: len(page.all("#thumbs button")) == 2)
    page.idle()
    assert page.focus() == "seed" and not page.find("#num_iter-problem").is_displayed()
    counts = {kind: len(page.all(f".map .{kind}")) for kind in ("accepted", "rejected", "alone")}
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


def test_a_seed_that_was_typed_stays_and_another_click_has_another(page):
    """Typing a seed locks it; without the lock every click draws one."""
    assert page.find("#lock").is_selected() and page.find("#seed").get_property("value") == "21"
    page.find("#lock").click()
    page.find("#generate").click()
    page.idle()
    assert page.find("#seed").get_property("value") != "21"
    page.find("#thumbs button:nth-child(2)").click()  # the one before: its seed, locked
    assert page.find("#seed").get_property("value") == "21" and page.find("#lock").is_selected()


def test_several_images_and_the_command_that_makes_them(page, tmp_path):
    """The command that is shown writes what the page shows, to the byte."""
    page.find("#n").send_keys("2")
    page.find("#generate").click()
    page.until(lambda: len(page.all(".sheet img")) == 2)
    page.idle()
    page.find(".copy").click()
    page.until(lambda: page.find(".command").is_displayed())
    program, *arguments = page.find(".command").text.split()
    assert program == "cspd-run"
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for index, image in enumerate(page.all(".sheet img")):
        shown = base64.b64decode(image.get_attribute("src").partition(",")[2])
        assert shown == (tmp_path / "out" / f"{index:05d}.png").read_bytes()
    page.find("#n").clear()


def test_save_hands_out_the_file(page, tmp_path):
    """The browser writes what is shown, under a name that says what it is."""
    downloads = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
    page.find("#seed").send_keys(Keys.ENTER)
    page.until(lambda: page.all(".canvas img") and page.find(".save").is_displayed())
    page.find(".save").click()
    page.until(lambda: (tmp_path / "bag-cspd-21-0.png").exists())
    source = page.find(".canvas img").get_attribute("src")
    page.until(
        lambda: (
            (tmp_path / "bag-cspd-21-0.png").read_bytes()
            == base64.b64decode(source.partition(",")[2])
        )
    )


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_says_so_and_gives_the_focus_back(page, server, way):
    page.execute("document.querySelector('#num_iter').value = 49")
    page.execute("document.querySelector('#head_steps').value = 400")
    page.find("#generate").click()
    page.until(lambda: page.focus() == "stop" and page.all(".map .alone"))
    if way == "button":
        page.find("#stop").click()
    else:
        page.find("#stop").send_keys(Keys.ESCAPE)
    page.idle()
    assert page.find(".verdict").text.startswith("stopped after ")
    assert page.find("#status").get_attribute("textContent") == "Stopped"
    assert page.focus() == "generate" and not page.find("#stop").is_displayed()
    server.wait_until(lambda: server.metric("cspd_queue_images") == 0)
    page.execute("document.querySelector('#num_iter').value = 10")
    page.execute("document.querySelector('#head_steps').value = 10")


def test_compare_runs_every_method_and_the_target_with_fewer_steps(page):
    page.find("#compare").click()
    page.until(lambda: len(page.all(".card .tools:not([hidden])")) == 5, 60)
    page.idle()
    cards = {card.get_attribute("data-method"): card for card in page.all(".card")}
    assert list(cards) == ["target", "cspd", "baseline", "lossless", "draft"]

    def read(name, what):
        return cards[name].find_element(By.CSS_SELECTOR, what).text

    seconds = {name: float(read(name, ".time")[:-2]) for name in cards}
    for name in list(cards)[1:]:
        # Both times and their ratio are shown with two digits behind the point.
        base, own, half = seconds["target"], seconds[name], 0.00501
        ratio = float(read(name, ".verdict b")[:-1])
        assert (base - half) / (own + half) - half <= ratio
        assert ratio <= (base + half) / (own - half) + half
    # The baseline has as many calls of the target as cspd took.
    assert read("baseline", ".target") == read("cspd", ".target")
    assert read("baseline", "h2") == f"target, {read('cspd', '.target')} steps"
    # Lossless: as many steps as the target, fewer calls of the head.
    assert read("lossless", ".target") == read("target", ".target") == "10"
    plain, made = int(read("target", ".head")), int(read("lossless", ".head"))
    assert plain == 100 and made < plain
    assert read("lossless", ".spared") == (
        f"{100 - made} % saved: {made} of {plain} calls of the head"
    )
    tops = [card.location["y"] for card in cards.values()]
    assert tops[0] == tops[1] == tops[2]


CONTRAST = """
const [front, ground] = arguments, canvas = document.createElement("canvas");
const box = canvas.getContext("2d", { willReadFrequently: true });
const light = (colour) => {
  box.fillStyle = colour; box.fillRect(0, 0, 1, 1);
  const linear = [...box.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2];
};
const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const [high, low] = [light(value(front)), light(value(ground))].sort((a, b) => b - a);
return (high + .05) / (low + .05);
"""


@pytest.mark.parametrize("dark", [False, True])
def test_cells_stand_out_in_every_state(page, dark):
    """WCAG 2.2, 1.4.11: 3:1, on the map, in the legend, in the columns."""
    page.size(1280, 900, dark=dark)
    for state in ("--accepted", "--rejected", "--alone", "--edge"):
        for ground in ("--well", "--paper", "--sheet"):
            assert page.driver.execute_script(CONTRAST, state, ground) >= 3
    drawn = (
        "return getComputedStyle(document.querySelector('.legend li:last-child .cell')).boxShadow"
    )
    assert "inset" in page.driver.execute_script(drawn)
    assert faint(page.driver) == []


def test_on_a_phone_the_result_scrolls_into_view(page):
    page.size(390, 844)
    page.execute("scrollTo(0, 0)")
    page.find("#generate").click()
    top = "return Math.round(document.querySelector('#cards').getBoundingClientRect().top)"
    page.until(lambda: 0 <= page.driver.execute_script(top) < 100)
    page.idle()
    assert 0 <= page.driver.execute_script(top) < 100
    page.find("#compare").click()
    page.until(lambda: len(page.all(".card .tools:not([hidden])")) == 5, 60)
    page.idle()


def test_fits_a_phone_and_the_dark(page):
    page.size(390, 844)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    assert len({card.location["y"] for card in page.all(".card")}) == 5
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = page.driver.execute_script(colour)
    page.size(1280, 900, dark=True)
    assert page.driver.execute_script(colour) != light


def test_nothing_broke_in_the_console(page):
    """No script error, nothing refused by the content security policy."""
    entries = [entry["message"] for entry in page.driver.get_log("browser")]
    assert [text for text in entries if not any(known in text for known in TRACES)] == []
