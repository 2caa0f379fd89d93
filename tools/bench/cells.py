"""Cells of the tables of a benchmark: what a setting is called, its output, times and ratios."""

from __future__ import annotations

from cspd.engines.console.table import DASH
from cspd.engines.words import counted
from cspd.runtime.commands.tables import ratio_text
from cspd.runtime.config import RunConfig
from cspd.tools.bench.plan import Point
from cspd.tools.bench.results import Results, Summary, neutral
from cspd.tools.judge.bootstrap import METHOD
from cspd.tools.settings import setting_name


def output(summary: Summary, main: Point) -> str:
    """Which distribution a method draws from, beside that of the reference setting."""
    config = summary.point.config
    if config.method == "cspd":
        return "approximate"
    if config.method == "draft":
        return "lossy (the draft alone)"
    changed = neutral(config.model_dump()) != neutral(main.config.model_dump())
    return "lossy (fewer steps)" if changed else "exact"


def host_note(results: Results) -> str:
    """Where and how the figures were measured."""
    header, main = results.header, results.main.config
    host = header["host"]
    where = (
        host["gpu"]
        if host["gpu"] != "none"
        else f"CPU, {counted(header['threads'] or int(host['cpus']), 'thread')}"
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
        "are per batch, a round is what the target does at once."
        f"{_score_note(results)}"
    )


def _score_note(results: Results) -> str:
    if not any(line["kind"] == "score" for line in results.lines):
        return ""
    return (
        " The Frechet distance is measured in the features of the judge named in the run, see "
        f"evaluate. ± {METHOD}."
    )


def name_of(item: Summary) -> str:
    """A method with the options that tell it apart from others of the same output and noise."""
    config = item.point.config
    usual = RunConfig(labels=config.labels, num_images=1)
    ignored = ("batch_size", "backend", "head_steps", "cfg", "cfg_schedule", "temperature")
    return setting_name(
        config, usual, ignored if config.method == "target" else (*ignored, "num_iter")
    )


def seconds(item: Summary) -> str:
    """Median with quartiles, which one batch does not have."""
    if item.batches == 1:
        return f"{item.seconds:.3g}"
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
