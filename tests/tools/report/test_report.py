import io
import json
import re
import shutil
from html.parser import HTMLParser
from typing import ClassVar

import numpy as np
import pytest
from browsing import faint, open_browser, resize
from click.testing import CliRunner
from PIL import Image
from selenium.webdriver.common.by import By

from cspd.engines.errors import CspdError
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.tools.bench import command as bench
from cspd.tools.bench.results import Results
from cspd.tools.bench.run import JOURNAL, PIXELS, read_lines
from cspd.tools.judge.bootstrap import Judged
from cspd.tools.judge.evaluate import Evaluation, make_variants
from cspd.tools.parity import command as parity
from cspd.tools.parity.measure import Row, Skipped
from cspd.tools.report import command as report
from cspd.tools.report import sections as report_sections
from cspd.tools.report.plots import COLOURS, GREY

QUICK = ["--quick", "--num-iter", "4", "--head-steps", "3", "--batch-size", "1"]
QUICK += ["--batch-size", "2", "--threads", "1", "--repeats", "1"]


class Judge:
    identity: ClassVar = {"name": "test", "extractor_sha256": "e" * 64, "statistics_sha256": "s"}

    def check(self, image_channels):
        pass

    def score(self, pixels, labels, seed):
        return Judged({"n": len(pixels), "frechet": float(pixels.mean())})


class Page(HTMLParser):
    """Tags that stay open, addresses that are loaded, anchors and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.loaded += [values["src"]] if "src" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.anchors |= {values["id"]} if "id" in values else set()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(tiny_bundle, tmp_path_factory):
    """Folders of a benchmark and an evaluation, and a parity file."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = [str(tiny_bundle.folder), *QUICK, "--out", str(folder / "bench")]
    assert CliRunner().invoke(bench.command, arguments).exit_code == 0
    few = tiny_bundle.manifest.geometry.model_copy(update={"num_classes": 3})
    manifest = tiny_bundle.manifest.model_copy(update={"geometry": few})
    cut = type(tiny_bundle)(tiny_bundle.folder, manifest)
    settings = {"num_iter": 2, "head_steps": 2}
    methods = [{"method": "target"}, {"method": "cspd"}]
    variants = make_variants(cut, methods, [0, 1], 3, settings)
    evaluation = Evaluation(tiny_bundle, variants, Judge(), folder / "evaluate", lambda _: None)
    record = evaluation.run(Pipeline(Sessions(tiny_bundle, threads=1)))
    (folder / "evaluate" / "evaluate.json").write_text(json.dumps(record))
    out = folder / "parity.json"
    arguments = [str(tiny_bundle.folder), "--num-iter", "2", "--head-steps", "5"]
    arguments += ["--rung", "trajectory", "--rung", "image", "--out", str(out)]
    assert CliRunner().invoke(parity.command, arguments).exit_code == 0
    return [folder / "bench", folder / "evaluate", out]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The report on all runs, and the folder of its plots."""
    folder = tmp_path_factory.mktemp("report")
    arguments = [*map(str, runs), "--out", str(folder / "r.html"), "--plots", str(folder / "p")]
    arguments += ["--markdown", str(folder / "r.md")]
    result = CliRunner().invoke(report.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return folder / "r.html", folder / "p"


def test_the_page_is_whole_and_loads_nothing(page):
    text = page[0].read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.loaded and all(address.startswith("data:") for address in parsed.loaded)
    assert all(link.startswith("#") and link[1:] in parsed.anchors for link in parsed.links)
    assert not re.search(r"@import|url\(|<script|<link", text)


def test_the_page_shows_every_run(page, tiny_bundle):
    text = page[0].read_text()
    for title in ("Which method?", "Methods side by side", "Table 1", "Table 4", "Figure 15",
                  "Scores", "Worst of each output", "Paired differences",
                  "Image by image", "Where the time goes", tiny_bundle.sha256,
                  "--quick"):  # fmt: skip
        assert title in text, title
    assert "SYNTHETIC" not in text


def test_plots_are_written_as_png(page):
    names = {path.stem for path in page[1].glob("*.png")}
    assert {"speed", "time", "figure-08-gamma", "figure-11-along-the-image", "figure-13-guidance",
            "figure-14-temperature", "figure-16-positions", "parity-image",
            "parity-trajectory"} <= names  # fmt: skip
    for path in page[1].glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_markdown_links_to_the_plots(page, tiny_bundle):
    folder = page[0].parent
    text = (folder / "r.md").read_text()
    links = re.findall(r"!\[.+\]\((.+)\)", text)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    assert len(set(titles)) == len(titles)
    assert "![Acceptance against gamma](" in text
    assert len(links) > 8 and all((folder / link).is_file() for link in links)
    for part in (
        "### Table 1",
        "### Figure 15",
        "### Scores",
        "### Worst of each comparison",
        tiny_bundle.sha256,
    ):
        assert part in text, part


def test_synthetic_runs_say_so(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "bench")
    lines = (copy / "bench.jsonl").read_text().splitlines(keepends=True)
    header = json.loads(lines[0]) | {"synthetic": True}
    (copy / "bench.jsonl").write_text(json.dumps(header) + "\n" + "".join(lines[1:]))
    text = report.build_report(report.load_sources([copy]), None).html()
    assert 'class="banner">SYNTHETIC' in text and "SYNTHETIC random weights" in text


def test_text_is_escaped(runs):
    (source, *_) = report.load_sources([runs[2]])
    source.record["rows"][0]["subject"] = "<script>alert(1)</script>"
    text = report.build_report([source], None).html()
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_parity_table_shows_the_worst():
    rows = [Row("graphs", "g", "z", "a", 1e-6, 1e-4), Row("graphs", "g", "z", "b", 1.0, 1e-4)]
    rows.append(Row("image", "g", "pixels", "a", 30.0, 40.0, unit="PSNR dB", higher_is_better=True))
    rows.append(Row("image", "g", "pixels", "b", 99.0, 40.0, unit="PSNR dB", higher_is_better=True))
    record = {
        "rows": [row.to_json() for row in rows],
        "skipped": [vars(Skipped("all", "tensorrt", "no device"))],
    }
    table = report_sections.parity_table(record, "Ladder", "output")
    assert [(row[3], row[5], row[6]) for row in table.rows] == [
        ("1", "FAIL", "2"), ("30 PSNR dB", "FAIL", "2"), ("-", "skipped", "0"),
    ]  # fmt: skip
    assert "no device" in table.note


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for path in (tmp_path, tmp_path / "x.json"):
        with pytest.raises(CspdError, match="holds no results"):
            report.load_sources([path])
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(CspdError, match="not JSON"):
        report.load_sources([tmp_path / "y.json"])


@pytest.mark.parametrize("odd", [{"distribution": 7}, {"images": "many"}, {"config": {"seed": 1}}])
def test_odd_values_of_a_run_without_checksum_are_not_printed(odd, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    record = {
        "distribution": "exact", "config": {"method": "cspd", "seed": 1}, "images": 2, "host": {},
        "bundle": {"sha256": "0" * 64, "synthetic": False}, "tool": "0.1",
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(record))
    page = report.build_report(report.load_sources([tmp_path]), None).html()
    assert "cspd, seed 1, 2 images: exact" in page
    (tmp_path / "run.json").write_text(json.dumps(record | odd))
    with pytest.raises(CspdError, match="not as this version writes them"):
        report.build_report(report.load_sources([tmp_path]), None)


@pytest.fixture(scope="module")
def scored(runs, tmp_path_factory):
    """The report on a benchmark with scores and kept images, beside everything else."""
    folder = tmp_path_factory.mktemp("scored")
    copy = shutil.copytree(runs[0], folder / "bench")
    header, *lines = read_lines(copy / JOURNAL)
    lines = [header | {"synthetic": True}, *lines]  # its banner has to be readable, too
    with (copy / JOURNAL).open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        for number, item in enumerate(Results(lines).serving("readme")):
            redrawn = [30.0 + number + 2 * (-1) ** k for k in range(100)]
            score = {"n": 10, "frechet": 30 + number}
            line = {"kind": "score", "point": item.point.id, "repeat": -2, "score": score}
            file.write(json.dumps(line | {"redrawn": {"frechet": redrawn}}) + "\n")
            (copy / PIXELS / item.point.id).mkdir(parents=True)
            pixels = np.random.default_rng(number).integers(0, 255, (12, 28, 28, 1), np.uint8)
            np.save(copy / PIXELS / item.point.id / "00000.npy", pixels)
    out = folder / "r.html"
    result = CliRunner().invoke(report.command, [str(copy), *map(str, runs[1:]), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out, result.stdout


@pytest.fixture(scope="module")
def driver():
    with open_browser() as opened:
        yield opened


def texts(driver, selector: str) -> list[str]:
    """What the parts of the page say, shown or not."""
    found = driver.find_elements(By.CSS_SELECTOR, selector)
    return [node.get_attribute("textContent").strip() for node in found]


def show(driver, path, width: int, dark: bool) -> None:
    """The page on a screen, everything folded out."""
    resize(driver, width, 900, dark)
    driver.get(f"file://{path}")
    driver.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_screen_and_can_be_read(scored, driver, width, dark):
    """No sideways scrolling, and every text stands out: WCAG 2.2, 1.4.3."""
    show(driver, scored[0], width, dark)
    root = "const root = document.documentElement; return root.scrollWidth <= root.clientWidth"
    assert driver.execute_script(root)
    assert faint(driver) == []
    # What is wider than the screen scrolls in a frame of its own.
    beyond = """return [...document.querySelectorAll("main *")].filter((node) =>
        node.getBoundingClientRect().right > innerWidth && !node.closest(".scroll, nav")).length"""
    assert driver.execute_script(beyond) == 0


@pytest.mark.parametrize("dark", [False, True])
def test_plots_stand_out_from_the_page(scored, driver, dark):
    """Every colour of the plots has 3:1 on the page, as the browser shows it: WCAG 2.2, 1.4.11."""
    show(driver, scored[0], 1280, dark)
    colours = (*COLOURS, GREY)
    svg = "<svg xmlns='http://www.w3.org/2000/svg' width='20' height='20'>{}</svg>"
    swatches = [svg.format(f"<rect width='20' height='20' fill='{colour}'/>") for colour in colours]
    addresses = [report_sections.data_uri(text.encode(), "image/svg+xml") for text in swatches]
    driver.execute_script(ADD_PLOTS, addresses)
    added = driver.find_elements(By.CSS_SELECTOR, "section:first-of-type > img")
    shown = {
        colour: Image.open(io.BytesIO(node.screenshot_as_png)).convert("RGB").getpixel((10, 10))
        for colour, node in zip(colours, added, strict=True)
    }
    panel = "return getComputedStyle(document.querySelector('section')).backgroundColor"
    ground = tuple(map(int, re.findall(r"\d+", driver.execute_script(panel))))
    assert len(set(shown.values())) == len(colours) and (luminance(ground) < 0.1) == dark
    assert [colour for colour, seen in shown.items() if contrast(seen, ground) < 3] == []


ADD_PLOTS = """
for (const source of arguments[0].reverse()) {
  const image = new Image();
  image.className = "plot";
  image.style.cssText = "display: inline-block; width: 20px; margin-right: 20px";
  image.src = source;
  document.querySelector("section").prepend(image);
}
return Promise.all([...document.images].map((image) => image.decode()));
"""


def luminance(rgb: tuple[int, ...]) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [c / 255 for c in rgb]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Contrast ratio of WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_headings_are_unique_and_the_navigation_repeats_no_word(scored, driver):
    show(driver, scored[0], 1280, False)
    headings = texts(driver, "h1, h2, h3")
    assert len(set(headings)) == len(headings)
    links = texts(driver, "nav a")
    assert links == texts(driver, "section h2")
    words = " ".join(links).lower().split()
    assert len(set(words)) == len(words) and len(links) > 5


def test_two_runs_of_one_kind_are_told_apart(runs, tmp_path):
    second = shutil.copytree(runs[1], tmp_path / "second")
    text = report.build_report(report.load_sources([runs[1], second]), None).html()
    titles = re.findall(r"<h2>(.+)</h2>", text)
    assert titles[:2] == [f"Quality, {runs[1]}", f"Quality, {second}"]


def test_images_of_every_method_stand_in_a_grid_with_captions(scored, driver):
    """Below each other: the same noise, another method."""
    show(driver, scored[0], 390, False)
    rows = driver.find_elements(By.CSS_SELECTOR, ".pairs")[0].find_elements(By.TAG_NAME, "figure")
    names = [row.find_element(By.TAG_NAME, "figcaption").text for row in rows]
    assert names[0] == "target, 4 steps" and "cspd, gamma 8" in names and len(names) > 4
    places = [[image.location["x"] for image in row.find_elements(By.TAG_NAME, "img")]
              for row in rows]  # fmt: skip
    assert all(len(found) == 10 and found == places[0] for found in places)


def test_the_report_begins_and_ends_with_the_verdict(scored):
    text = scored[0].read_text()
    assert re.search(r"<h2>(.+?)</h2>", text)[1] == "Which method?"
    assert ">fastest way at equal quality<" in text
    assert "fastest way at equal" in scored[1].partition("Which method?")[2]
    assert "where cspd stands" in scored[1].partition("Which method?")[2]


def test_quality_stands_only_where_there_is_quality(page, scored):
    """Without scores there is no column for them; with a Frechet distance there is that alone."""
    plain, with_scores = (
        " ".join(re.findall(r'<section id="(?:verdict|bench)-.*?</section>', text, re.DOTALL))
        for text in (page[0].read_text(), scored[0].read_text())
    )
    assert "Speed ratio" in plain and "Frechet" not in plain
    with_scores = re.findall(r"<th[^>]*>(.+?)</th>", with_scores)
    assert any("Frechet" in column for column in with_scores)
    assert not any("accuracy" in column for column in with_scores)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(runs, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "r.html", tmp_path):
        for command in ([report.command, str(runs[0])], [parity.command]):
            result = CliRunner().invoke(command[0], [*command[1:], "--out", str(out)])
            assert isinstance(result.exception, CspdError), result.output
    out = tmp_path / "new" / "r.html"
    assert CliRunner().invoke(report.command, [str(runs[2]), "--out", str(out)]).exit_code == 0
    assert out.is_file()
