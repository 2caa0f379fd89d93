"""The parts of a report: what each kind of run puts on the page."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cspd.engines.console.table import Table
from cspd.engines.words import counted
from cspd.runtime.store.images import encode_png, numbered
from cspd.runtime.store.ownership import GRID, RUN
from cspd.tools.bench.cells import name_of, percent, ratio
from cspd.tools.bench.results import Results
from cspd.tools.bench.run import PIXELS
from cspd.tools.bench.tables import TABLES
from cspd.tools.bench.verdict import TITLE, verdict_table
from cspd.tools.judge import scores
from cspd.tools.judge.tables import tables
from cspd.tools.report.parts import Card, PairRow, Pairs, Picture, Section
from cspd.tools.report.plots import FIGURES, errors_by_step, save
from cspd.tools.report.sources import Source

SHOWN_IMAGES = 10


def header_of(source: Source) -> dict[str, Any]:
    """What a run says about its bundle, machine and command."""
    return source.record["lines"][0] if source.kind == "bench" else source.record


def synthetic(source: Source) -> bool:
    """Whether the run is about random weights."""
    header = header_of(source)
    return bool(header["synthetic"] if source.kind == "bench" else header["bundle"]["synthetic"])


def data_uri(content: bytes, kind: str) -> str:
    """`content` as a `data:` address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Group:
    """Tables and figures of a benchmark that are read together."""

    title: str
    text: str
    tables: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


GROUPS = (
    Group(
        "Comparison",
        "Every method beside the baselines it has to beat: fewer steps of the target, and the "
        "target with as many calls as speculation makes.",
        tables=("readme",), figures=("pareto",), data=("pareto",),
    ),
    Group(
        "Speed",
        "Speed ratio to the target alone at the same batch size.",
        tables=("table 1",), figures=("speed", "figure-08-gamma"), data=("figure 8",),
    ),
    Group("Guidance", "Quality with and without guidance.", tables=("table 2",)),
    Group(
        "Acceptance",
        "What decides whether the target keeps a drafted token.",
        tables=("table 3", "table 4"),
        figures=(
            "figure-11-along-the-image", "figure-16-positions", "figure-13-guidance",
            "figure-14-temperature", "figure-15-tries",
        ),
        data=("figure 11", "figure 13", "figure 14", "figure 15"),
    ),
    Group(
        "Time",
        "By network, against PyTorch eager and compiled on the same device.",
        tables=("time", "start"), figures=("time",),
    ),
)  # fmt: skip


def bench_sections(source: Source, number: int, plots: Path | None) -> list[Section]:
    """Tables and figures of a benchmark, grouped; without groups that hold nothing."""
    results = Results(source.record["lines"])
    made = [verdict_section(results, f"bench-{number}-verdict")]
    made += [bench_section(results, group, f"bench-{number}-{index}", plots)
            for index, group in enumerate(GROUPS)]  # fmt: skip
    made[1].pairs += kept_images(results, source.folder)
    return [section for section in made if section.tables or section.plots]


def verdict_section(results: Results, anchor: str) -> Section:
    """Which method to use, before the figures that say so."""
    table = verdict_table(results)
    return Section(TITLE, anchor, tables=[table] if table.rows else [])


def bench_section(results: Results, group: Group, anchor: str, plots: Path | None) -> Section:
    """The tables and figures of one group."""
    tables, data = (
        [table for table in (TABLES[name](results) for name in names) if table.rows]
        for names in (group.tables, group.data)
    )
    section = Section(group.title, anchor, group.text, tables=tables, data=data)
    for name in group.figures:
        figure = FIGURES[name](results)
        if figure is not None:
            caption = figure.axes[0].get_title(loc="left")
            look = "map" if figure.axes[0].images else ""
            image = data_uri(save(figure, plots, name), "image/svg+xml")
            section.plots.append(Picture(caption, image, look, name))
    return section


def kept_images(results: Results, folder: Path) -> list[Pairs]:
    """The first images of every scored method, which the benchmark kept."""
    rows = []
    for item in results.serving("readme"):
        found = sorted((folder / PIXELS / item.point.id).glob("[0-9]*.npy"))
        images = (pixels for path in found for pixels in np.load(path, mmap_mode="r"))
        shown = itertools.islice(images, SHOWN_IMAGES)
        uris = [data_uri(encode_png(pixels, {}), "image/png") for pixels in shown]
        rows += [PairRow(name_of(item), uris)] if uris else []
    return [Pairs("The same noise, another method", rows)] if rows else []


def bench_cards(source: Source) -> list[Card]:
    """What a benchmark comes down to: speed ratios to the target, acceptance."""
    results = Results(source.record["lines"])
    if not results.batches(results.main.id):
        return []
    reference, cards, equal = results.summary(results.main), [], None
    shown = results.serving("readme")
    clock = f", {results.clock}" if results.by_processor_time else ""
    cspd = next((item for item in shown if item.point.config.method == "cspd"), None)
    for item in shown:
        config, speed = item.point.config, ratio(results, item, reference)
        if config.method == "target" and cspd and item.target_calls == cspd.target_calls:
            equal = Card(speed, f"target with as many calls ({config.num_iter} steps){clock}")
        elif item is cspd:
            cards.append(Card(speed, f"speed of cspd, gamma {config.gamma}{clock}"))
            cards.append(Card(percent(item.acceptance), "of judged tokens accepted"))
        elif config.method == "lossless" and config.window:
            label = f"speed of lossless, window {config.window}, exact{clock}"
            cards.append(Card(speed, label))
    return [*cards[:1], *([equal] if equal else []), *cards[1:]]


def subtitle(source: Source) -> str:
    """Models, machine and code of a benchmark."""
    header = header_of(source)
    models = " + ".join(f"{preset} ({role})" for role, preset in header["models"].items())
    host = header["host"]
    machine = host["gpu"] if host["gpu"] != "none" else counted(int(host["cpus"]), "CPU core")
    code = f", commit {header['commit'][:12]}" if header.get("commit") else ""
    return f"{models}. {machine} ({host['machine']}), PyTorch {host['torch']}{code}."


def evaluate_section(source: Source, number: int) -> Section:
    """Scores, paired differences and image pairs of an evaluation."""
    record = source.record
    section = Section("Quality", f"quality-{number}", tables=tables(record))
    seed = record["scores"][0]["config"]["seed"]
    same = [score for score in record["scores"] if score["config"]["seed"] == seed]
    step = max(1, record["n"] // SHOWN_IMAGES)
    indices = range(0, record["n"], step)[:SHOWN_IMAGES]
    rows = [
        PairRow(s["setting"], _images(source.folder / s["folder"], indices, record["n"]))
        for s in same
    ]
    if any(row.images for row in rows):
        section.pairs.append(Pairs("Image by image", rows))
    return section


def _images(folder: Path, indices: Iterable[int], count: int) -> list[str]:
    paths = (folder / numbered(index, count, "png") for index in indices)
    return [data_uri(path.read_bytes(), "image/png") for path in paths if path.is_file()]


def parity_section(source: Source, number: int, plots: Path | None) -> Section:
    """The parity ladder, its worst row per comparison, and how errors grow."""
    record = source.record
    verdict = "passed" if record["passed"] else "FAILED"
    section = Section(
        "Parity", f"parity-{number}",
        text=f"The ladder {verdict}: {len(record['rows'])} comparisons with PyTorch.",
        tables=[parity_table(record, "Worst of each comparison", "unit")],
        data=[parity_table(record, "Worst of each output", "output")],
    )  # fmt: skip
    for rung in ("trajectory", "image"):
        figure = errors_by_step(record, rung)
        if figure is not None:
            caption = figure.axes[0].get_title(loc="left")
            image = save(figure, plots, f"parity-{rung}")
            picture = Picture(caption, data_uri(image, "image/svg+xml"), name=f"parity-{rung}")
            section.plots.append(picture)
    return section


MEASURES = ("max_abs", "mean_abs", "p99_abs", "max_rel", "mean_rel", "p99_rel", "cosine")


def parity_table(record: dict[str, Any], title: str, last_key: str) -> Table:
    """The worst row of every rung, subject and `last_key`, which is "unit" or "output"."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((row["rung"], row["subject"], row[last_key]), []).append(row)
    rows = [_parity_row(group) for group in groups.values()]
    blanks = ["-"] * len(MEASURES)
    rows += [[s["rung"], s["subject"], "-", "-", "-", "skipped", "0", *blanks]
             for s in record["skipped"]]  # fmt: skip
    columns = ("rung", "subject", "output", "error", "tolerance", "verdict", "of",
               *(name.replace("_", " ") for name in MEASURES))  # fmt: skip
    notes = {item["reason"] for item in record["skipped"]}
    return Table(title, columns, rows, "Skipped: " + "; ".join(sorted(notes)) if notes else "")


def _parity_row(group: list[dict[str, Any]]) -> list[str]:
    worst = max(group, key=_badness)
    stats = worst["stats"] or {}
    verdict = "pass" if worst["passed"] else ("FAIL" if worst["gate"] else "would fail")
    unit = "" if worst["unit"] == "relative" else f" {worst['unit']}"
    figures = [_number(stats.get(name), ".6f" if name == "cosine" else ".1e") for name in MEASURES]
    return [
        worst["rung"], worst["subject"], worst["output"], _number(worst["error"]) + unit,
        _number(worst["tolerance"]), verdict, str(len(group)), *figures,
    ]  # fmt: skip


def _badness(row: dict[str, Any]) -> tuple[bool, float]:
    error = float("inf") if row["error"] is None else row["error"]
    return not row["passed"], -error if row["higher_is_better"] else error


def _number(value: float | None, form: str = ".2g") -> str:
    return "-" if value is None else format(value, form)


def parity_cards(source: Source) -> list[Card]:
    """The verdict of the ladder."""
    rows = source.record["rows"]
    if source.record["passed"]:
        return [Card("pass", f"parity: {len(rows)} comparisons with PyTorch", "good")]
    failed = sum(row["gate"] and not row["passed"] for row in rows)
    return [Card("FAIL", f"parity: {failed} of {len(rows)} comparisons with PyTorch", "bad")]


def evaluate_cards(source: Source) -> list[Card]:
    """Accuracy of the first setting with half its interval, where the judge measures one."""
    rows = [row for row in source.record["spread"] if row["score"] == "accuracy"]
    return [
        Card(
            scores.text("accuracy", row["mean"], row.get("interval")),
            f"accuracy of {row['setting']}, {row['seeds']} x n = {source.record['n']}",
        )
        for row in rows[:1]
    ]


def images_section(sources: list[Source]) -> Section:
    """The pictures of runs of `generate`, a caption each."""
    section = Section("Images", "images")
    for source in sources:
        # At the top in runs of before version 2 of their schema.
        grids = (source.folder / name for name in (GRID, "grid.png"))
        if grid := next((path for path in grids if path.is_file()), None):
            caption = caption_of(source.record)
            section.pictures.append(Picture(caption, data_uri(grid.read_bytes(), "image/png")))
    return section


def caption_of(record: dict[str, Any]) -> str:
    """What a run.json says about its pictures; TypeError if it has values of another kind."""
    config, count = record["config"], record["images"]
    # Version 1 of the schema called it law.
    words = record.get("distribution") or record["law"]
    for value, kind in ((config["method"], str), (config["seed"], int), (count, int), (words, str)):
        if type(value) is not kind:
            raise TypeError(f"{value!r:.40} in {RUN}")
    return f"{config['method']}, seed {config['seed']}, {count} images: {words}"


def provenance_section(sources: list[Source]) -> Section:
    """Bundles, machines, versions and commands behind the page."""
    rows, commands = [], []
    for source in sources:
        header = header_of(source)
        bundle = header["bundle"] if source.kind == "bench" else header["bundle"]["sha256"]
        host = ", ".join(f"{name} {value}" for name, value in header["host"].items())
        commit = header.get("commit") or "-"
        # Records are read from files, where anything may stand.
        rows.append([source.kind, str(bundle), f"cspd {header['tool']}", str(commit), host])
        commands += [str(header["command"])] if header.get("command") else []
    columns = ("run", "bundle sha256", "tool", "commit", "machine")
    return Section(
        "Origin", "origin", tables=[Table("Runs", columns, rows)],
        code="\n".join(commands),
    )  # fmt: skip


def sections_of(sources: list[Source], plots: Path | None) -> list[Section]:
    """The parts of the page; plots also go to the folder `plots`.

    Where several runs are of one kind, their sections have the folder in their title.
    """
    makers = {
        "bench": lambda source, number: bench_sections(source, number, plots),
        "evaluate": lambda source, number: [evaluate_section(source, number)],
        "parity": lambda source, number: [parity_section(source, number, plots)],
    }
    kinds = [source.kind for source in sources]
    made = []
    for number, source in enumerate(sources):
        for section in makers[source.kind](source, number) if source.kind in makers else []:
            if kinds.count(source.kind) > 1:
                section.title += f", {source.folder}"
            made.append(section)
    images = images_section([source for source in sources if source.kind == "run"])
    return [*made, *([images] if images.pictures else []), provenance_section(sources)]


def cards_of(source: Source) -> list[Card]:
    """The figures of a run that the page leads with."""
    makers = {"bench": bench_cards, "evaluate": evaluate_cards, "parity": parity_cards}
    return makers[source.kind](source) if source.kind in makers else []
