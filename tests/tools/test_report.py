import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import ClassVar

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cspd.engines.errors import CspdError
from cspd.runtime.pipeline import Pipeline
from cspd.tools import bench, parity, report, report_sections
from cspd.tools.bootstrap import Judged
from cspd.tools.evaluate import Evaluation, make_variants
from cspd.tools.parity_measure import Row, Skipped

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
    record = evaluation.run(Pipeline(tiny_bundle, threads=1))
    (folder / "evaluate" / "evaluate.json").write_text(json.dumps(record))
    out = folder / "parity.json"
    arguments = [str(tiny_bundle.folder), "--num-iter", "2", "--head-steps", "5", "--seeds", "1"]
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
                  "The same noise, another method", "Where the time goes", tiny_bundle.sha256,
                  "bench --quick"):  # fmt: skip
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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(*arguments: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_fits_the_screen(page, tmp_path, width):
    # Chromium lays a page out for 500 pixels at least when it prints the document.
    measure = "document.documentElement.scrollWidth + '/' + window.innerWidth"
    copy = tmp_path / "r.html"
    probe = f"<script>document.title = {measure}</script></body>"
    copy.write_text(page[0].read_text().replace("</body>", probe))
    shot = tmp_path / "shot.png"
    size = f"--window-size={width},3000"
    dom = browse(size, "--dump-dom", f"file://{copy}")
    found = re.search(r"<title>(\d+)/(\d+)</title>", dom)
    assert found and int(found[1]) <= int(found[2]) <= max(width, 500)
    browse(size, f"--screenshot={shot}", f"file://{page[0]}")
    with Image.open(shot) as image:
        assert image.width == width
        pixels = np.asarray(image.convert("L"))
    # Text and plots in every part of the page, not an empty sheet.
    assert all(part.std() > 5 for part in np.array_split(pixels, 4))


def test_a_place_that_cannot_be_written_is_refused_before_the_work(runs, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "r.html", tmp_path):
        for command in ([report.command, str(runs[0])], [parity.command]):
            result = CliRunner().invoke(command[0], [*command[1:], "--out", str(out)])
            assert isinstance(result.exception, CspdError), result.output
    out = tmp_path / "new" / "r.html"
    assert CliRunner().invoke(report.command, [str(runs[2]), "--out", str(out)]).exit_code == 0
    assert out.is_file()
