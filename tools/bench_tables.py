"""Tables and figure data of a benchmark, from the lines of its journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from cspd.runtime.config import RunConfig
from cspd.runtime.tables import ratio_text
from cspd.tools.bench_plan import Point
from cspd.tools.bench_results import Results, Summary, neutral
from cspd.tools.bootstrap import METHOD
from cspd.tools.settings import setting_name

DASH = "-"


@dataclass(frozen=True)
class Table:
    """A table as text: `rows` hold one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""

    def filled(self) -> Table:
        """The table without columns that hold nothing, as scores do where nothing was scored."""
        if not self.rows:
            return self
        kept = [column for column in range(len(self.columns))
                if any(row[column] != DASH for row in self.rows)]  # fmt: skip
        return Table(
            self.title, tuple(self.columns[k] for k in kept),
            [[row[k] for k in kept] for row in self.rows], self.note,
        )  # fmt: skip

    def markdown(self, under: str = "") -> str:
        """The table in Markdown, its title as a heading unless that is `under`, the one above."""
        lines = [] if self.title == under else [f"### {self.title}", ""]
        lines += [_row(self.columns), _row("---" for _ in self.columns)]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def law(summary: Summary, main: Point) -> str:
    """Which distribution a method draws from, beside that of the reference setting."""
    config = summary.point.config
    if config.method == "cspd":
        return "approximate"
    if config.method == "draft":
        return "lossy (law of the draft)"
    changed = neutral(config.model_dump()) != neutral(main.config.model_dump())
    return "lossy (fewer steps)" if changed else "exact"


def readme_table(results: Results) -> Table:
    """Every method beside the honest baselines, with its law."""
    main, rows = results.main, []
    reference = results.summary(main) if results.batches(main.id) else None
    cspd = next(iter(results.serving("readme", method="cspd")), None)
    for item in results.serving("readme"):
        equal = cspd is not None and item.point.config.method == "target" and (
            item.target_calls == cspd.target_calls
        )  # fmt: skip
        rows.append([
            name_of(item) + (" (as many target calls as cspd)" if equal else ""),
            law(item, main), seconds(item), ratio(results, item, reference),
            percent(item.acceptance), f"{item.target_rounds:.0f}",
            f"{item.target_calls:.0f}", f"{item.draft_calls:.0f}",
            item.scored("accuracy", ".1%"), item.scored("frechet", ".1f"),
        ])  # fmt: skip
    counts = sorted({int(item.score["n"]) for item in results.serving("readme") if item.score})
    columns = (
        "method", "law", "seconds per image", "speed vs target", "acceptance",
        "target rounds", "target calls", "draft calls", "classifier accuracy",
        f"Frechet distance{_n(counts)}",
    )  # fmt: skip
    return Table("Methods side by side", columns, rows, host_note(results)).filled()


def _n(counts: list[int]) -> str:
    return f" (n = {', '.join(map(str, counts))})" if counts else ""


def host_note(results: Results) -> str:
    """Where and how the figures were measured."""
    header, main = results.header, results.main.config
    host = header["host"]
    where = (
        host["gpu"]
        if host["gpu"] != "none"
        else f"CPU, {header['threads'] or host['cpus']} threads"
    )
    names = " + ".join(f"{role} {preset}" for role, preset in header["models"].items())
    warning = ""
    if header["synthetic"]:
        warning = "SYNTHETIC random weights, quality and acceptance mean nothing. "
    if header["replayed"]:
        source = header["replayed"]["source"][:12]
        warning += f"Acceptance REPLAYED from a run of bundle {source}, not measured here. "
    if results.by_processor_time:
        warning += f"The machine was busy (median load {results.load:.1f}): speeds are compared by "
        warning += "processor time; seconds are by the clock and hold what others took. "
    return (
        f"{warning}{names}; {where} ({host['machine']}), {results.main.backend}; batch "
        f"{main.batch_size}, {main.num_iter} autoregressive and {main.head_steps} denoising steps, "
        f"guidance {main.cfg:g} {main.cfg_schedule}; median and quartiles of batches; calls "
        "are per batch, a round is what the target does at once. The "
        "Frechet distance is measured in the features of the judge named in the run, see evaluate. "
        f"± {METHOD}."
    )


def name_of(item: Summary) -> str:
    """A method with the options that tell it apart from others of the same law and noise."""
    config = item.point.config
    usual = RunConfig(labels=config.labels, num_images=1)
    ignored = ("batch_size", "backend", "head_steps", "cfg", "cfg_schedule", "temperature")
    return setting_name(
        config, usual, ignored if config.method == "target" else (*ignored, "num_iter")
    )


def seconds(item: Summary) -> str:
    """Median with quartiles."""
    return f"{item.seconds:.3g} ({item.low:.3g} to {item.high:.3g})"


def ratio(results: Results, item: Summary, reference: Summary | None) -> str:
    """Speed ratio to the reference, by the clock that can be trusted; rough if measured once."""
    if reference is None:
        return DASH
    if item.point.id == reference.point.id:
        return "1.00x"
    return ratio_text(results.speedup(item, reference), min(item.batches, reference.batches))


def percent(value: float | None) -> str:
    """A share as percentage."""
    return DASH if value is None else f"{value:.1%}"


def figure(value: float | None, form: str = ".3g") -> str:
    """A number that may be missing."""
    return DASH if value is None else format(value, form)


def table_1(results: Results) -> Table:
    """Speed ratio and acceptance for every gamma and batch size."""
    rows = []
    for item in results.serving("table 1", method="cspd"):
        config = item.point.config
        reference = results.baseline(config.batch_size)
        rows.append([
            str(config.batch_size), str(config.gamma), seconds(item),
            ratio(results, item, reference), percent(item.acceptance), f"{item.target_calls:.0f}",
            f"{item.draft_calls:.0f}",
        ])  # fmt: skip
    columns = ("batch", "gamma", "seconds per image", "speed vs target", "acceptance",
               "target calls", "draft calls")  # fmt: skip
    return Table("Table 1: speed and acceptance", columns, rows)


def table_2(results: Results) -> Table:
    """Quality with and without guidance."""
    rows = [
        [
            item.point.config.method, f"{item.point.config.cfg:g}",
            figure(item.score.get("n"), "d"), item.scored("accuracy", ".1%"),
            item.scored("frechet", ".1f"),
            figure(item.score.get("inception_score")), percent(item.score.get("precision")),
            percent(item.score.get("recall")), seconds(item),
        ]
        for item in results.serving("table 2")
        if item.score
    ]  # fmt: skip
    columns = ("method", "guidance", "n", "accuracy", "Frechet distance", "Inception score",
               "precision", "recall", "seconds per image")  # fmt: skip
    return Table("Table 2: quality with and without guidance", columns, rows).filled()


def sweep_table(results: Results, tag: str, title: str, option: str) -> Table:
    """One option of `cspd` against acceptance and speed."""
    rows = []
    for item in results.serving(tag, method="cspd"):
        config = item.point.config
        reference = results.baseline(config.batch_size)
        value = getattr(config, option)
        rows.append([
            ("on" if value else "off") if isinstance(value, bool) else f"{value:g}",
            percent(item.acceptance), percent(item.replaced), figure(item.distance),
            seconds(item), ratio(results, item, reference), f"{item.target_calls:.0f}",
        ])  # fmt: skip
    columns = (option, "acceptance", "target's own", "mean token distance", "seconds per image",
               "speed vs target", "target calls")  # fmt: skip
    return Table(title, columns, rows)


# Columns of the table of times, and the graphs behind each.
PARTS = {
    "target transformer": ("target/backbone",),
    "target head": ("target/denoiser", "target/speculative", "target/head_modulation"),
    "draft transformer": ("draft/backbone",),
    "draft head": ("draft/denoiser", "draft/speculative", "draft/head_modulation"),
    "pixels": ("decoder",),
}


def time_table(results: Results) -> Table:
    """Where the time goes: by network and outside, and memory, of all methods and peers."""
    rows = []
    shown = {item.point.id: item for tag in ("readme", "peers") for item in results.serving(tag)}
    for item in shown.values():
        rows.append([
            name_of(item), item.point.backend, f"{item.seconds * 1e3:.0f}",
            DASH if item.cpu_seconds is None else f"{item.cpu_seconds * 1e3:.0f}",
            *(_part(item, starts) for starts in PARTS.values()), percent(item.host),
            f"{item.peak_memory_mb:.0f}", str(item.batches),
        ])  # fmt: skip
    columns = (
        "method",
        "backend",
        "all",
        "CPU time",
        *PARTS,
        "outside",
        "peak memory, MB",
        "batches",
    )
    skips = {line["backend"]: line["reason"] for line in results.lines[1:]
             if line["kind"] == "skip"}  # fmt: skip
    note = "Milliseconds per image, in brackets calls per batch; outside: the host's share."
    note += "".join(f" {backend} skipped: {why}." for backend, why in skips.items())
    return Table("Where the time goes", columns, rows, note)


def _part(item: Summary, starts: tuple[str, ...]) -> str:
    names = [name for name in item.graphs if name.startswith(starts)]
    if not names:
        return DASH
    milliseconds = seconds_in(item, starts) * 1e3
    return f"{milliseconds:.0f} ({sum(item.calls[name] for name in names):.0f})"


def seconds_in(item: Summary, starts: tuple[str, ...]) -> float:
    """Seconds per image in the graphs whose names start so."""
    return sum(value for name, value in item.graphs.items() if name.startswith(starts))


def start_table(results: Results) -> Table:
    """Cold and warm: the first batch of a method on a backend against the later ones."""
    rows = []
    for line in results.lines[1:]:
        if line["kind"] != "batch" or line["repeat"] >= 0 or not results.batches(line["point"]):
            continue
        item, images = results.summary(results.points[line["point"]]), line["images"]
        first = line["cpu_seconds"] if results.by_processor_time else line["seconds"]
        rows.append([
            item.point.backend, name_of(item), str(images), f"{line['seconds']:.2f}",
            f"{item.seconds * images:.2f}", ratio_text(first / (results.cost(item) * images), 1),
        ])  # fmt: skip
    columns = ("backend", "method", "batch", "first batch, s", "later batches, s",
               "cold / warm")  # fmt: skip
    starts = [line for line in results.lines[1:] if line["kind"] == "start"]
    note = "; ".join(f"{line['backend']}: sessions opened in {line['seconds']:.2f} s "
                     f"({line['which']})" for line in starts)  # fmt: skip
    return Table("Cold and warm", columns, rows, note)


def steps_table(results: Results) -> Table:
    """Figure 11: acceptance against the number of tokens known when the round began."""
    rows = [
        [str(known), str(judged), percent(accepted / judged)]
        for known, (accepted, judged) in acceptance_by_known(results).items()
    ]
    columns = ("known tokens", "judged tokens", "acceptance")
    return Table("Figure 11: acceptance along the image", columns, rows)


def acceptance_by_known(results: Results) -> dict[int, tuple[int, int]]:
    """Accepted and judged tokens of the rounds that began with so many known tokens."""
    counts: dict[int, tuple[int, int]] = {}
    for item in results.serving("figure 11"):
        for line in results.batches(item.point.id):
            for known, verdicts in line["rounds"].items():
                accepted, judged = counts.get(int(known), (0, 0))
                judged += verdicts["proposed"] - verdicts["discarded"]
                counts[int(known)] = accepted + verdicts["accepted"], judged
    return dict(sorted(counts.items()))


def pareto_table(results: Results) -> Table:
    """Quality against time of every scored setting."""
    reference = results.summary(results.main) if results.batches(results.main.id) else None
    rows = [
        [
            name_of(item), law(item, results.main), seconds(item),
            ratio(results, item, reference),
            item.scored("accuracy", ".1%"), item.scored("frechet", ".1f"),
            figure(item.score.get("n"), "d"),
        ]
        for item in sorted(results.serving("pareto"), key=results.cost)
        if item.score
    ]  # fmt: skip
    columns = ("method", "law", "seconds per image", "speed vs target", "accuracy",
               "Frechet distance", "n")  # fmt: skip
    return Table("Quality against time", columns, rows).filled()


def tries_table(results: Results) -> Table:
    """Figure 15: how often the residual law yields a token within so many draws."""
    rows = [[str(tries), str(rejected), percent(share)]
            for tries, rejected, share in tries_shares(results)]  # fmt: skip
    return Table("Figure 15: resampling tries", ("tries", "rejected tokens", "resampled"), rows)


def tries_shares(results: Results) -> list[tuple[int, int, float]]:
    """Allowed draws, rejected tokens, and the share of these that the residual replaced."""
    found = []
    for line in results.of("tries", "probe"):
        resampled = line["verdicts"]["resampled"]
        rejected = resampled + line["verdicts"]["fallback"]
        if rejected:
            found.append((line["tries"], rejected, resampled / rejected))
    return sorted(found)


def _sweep(tag: str, title: str, option: str) -> Callable[[Results], Table]:
    return partial(sweep_table, tag=tag, title=f"{tag.capitalize()}: {title}", option=option)


TABLES: dict[str, Callable[[Results], Table]] = {
    "readme": readme_table,
    "table 1": table_1,
    "table 2": table_2,
    "table 3": _sweep("table 3", "with and without alignment", "align"),
    "table 4": _sweep("table 4", "share prefilled by the target", "prefill"),
    "figure 8": _sweep("figure 8", "acceptance against gamma", "gamma"),
    "figure 11": steps_table,
    "figure 13": _sweep("figure 13", "acceptance against guidance", "cfg"),
    "figure 14": _sweep("figure 14", "acceptance against temperature", "temperature"),
    "figure 15": tries_table,
    "pareto": pareto_table,
    "time": time_table,
    "start": start_table,
}
