"""The figures of a report: every function draws one from measured data, or returns None."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler

from cspd.tools.bench.cells import name_of
from cspd.tools.bench.results import Results, Summary
from cspd.tools.bench.tables import acceptance_by_known, tries_shares
from cspd.tools.bench.times import PARTS, seconds_in

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

SIZE = (5.4, 3.4)  # inches; small, so that letters stay readable on a phone
# After Okabe and Ito, told apart by everyone; the light ones darker, so that every colour has 3:1
# on the page, also through the filter of the dark page.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b35a8f", "#a66f00", "#2f8fc4", "#000000")
GREY = "#8c8c8c"
LABEL = 22  # characters a line beside a bar, so that the bars keep half of the width
METHODS = ("target", "cspd", "draft", "lossless", "auto")
METHOD_COLOURS = dict(zip(METHODS, COLOURS, strict=False))
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.prop_cycle": cycler(color=COLOURS), "lines.linewidth": 1.8,
    "svg.fonttype": "path", "legend.frameon": False,
}  # fmt: skip


def new_figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot with its labels."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def save(figure: Figure, folder: Path | None, name: str) -> bytes:
    """The figure as SVG; also written to `folder` as PNG on white, if one is given."""
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(buffer, format="svg")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def pareto(results: Results) -> Figure | None:
    """Quality against time: down and left is better."""
    scored = [item for item in results.serving("pareto") if item.score]
    if not scored:
        return None
    count = scored[0].score["n"]
    figure, axes = new_figure(
        "Quality against time",
        f"seconds per image, {results.clock}",
        f"Frechet distance, n = {count:.0f}, 95 %",
    )
    for method in METHODS:
        items = [item for item in scored if item.point.config.method == method]
        items.sort(key=results.cost)
        if items:
            x, y = [results.cost(i) for i in items], [i.score["frechet"] for i in items]
            error = [
                i.interval.get("frechet", [v, v])[1] - v for i, v in zip(items, y, strict=True)
            ]
            style = "o-" if len(items) > 2 else "o"
            axes.errorbar(x, y, error, fmt=style, label=method, color=METHOD_COLOURS[method],
                          elinewidth=1, capsize=2)  # fmt: skip
            for item in items:
                label = name_of(item).partition(", ")[2]
                axes.annotate(label, (results.cost(item), item.score["frechet"]), fontsize=8,
                              xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        # Plain numbers, and few of them: the span is about one decade.
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    axes.legend()
    return figure


def speed_against_gamma(results: Results) -> Figure | None:
    """Table 1 as a picture: speed ratio against gamma, a line per batch size."""
    items = results.serving("table 1", method="cspd")
    if not items:
        return None
    figure, axes = new_figure("Speed against gamma", "gamma", f"speed ratio, {results.clock}")
    for size in sorted({item.point.config.batch_size for item in items}):
        reference = results.baseline(size)
        group = [item for item in items if item.point.config.batch_size == size]
        if reference is not None:
            x = [item.point.config.gamma for item in group]
            ratios = [results.speedup(i, reference) for i in group]
            axes.plot(x, ratios, "o-", label=f"batch {size}")
    axes.axhline(1, color=GREY, linewidth=1)
    gammas = sorted({item.point.config.gamma for item in items})
    axes.set_xscale("log", base=2)
    axes.set_xticks(gammas, [str(gamma) for gamma in gammas])
    axes.legend()
    return figure


def _sweep(results: Results, tag: str, option: str, title: str) -> Figure | None:
    items = results.serving(tag, method="cspd")
    points = [
        (getattr(item.point.config, option), item.acceptance)
        for item in items
        if item.acceptance is not None
    ]
    if len(points) < 2:
        return None
    figure, axes = new_figure(title, option, "accepted per judged token")
    axes.plot(*zip(*points, strict=True), "o-")
    if option == "gamma":
        axes.set_xscale("log", base=2)
    axes.set_xticks([value for value, _ in points], [f"{value:g}" for value, _ in points])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1 * max(share for _, share in points) or 1)
    return figure


def acceptance_along_image(results: Results) -> Figure | None:
    """Figure 11: acceptance of the rounds that began with so many known tokens."""
    counts = acceptance_by_known(results)
    if not counts:
        return None
    figure, axes = new_figure(
        "Acceptance along the image",
        "known tokens when the round began",
        "accepted per judged token",
    )
    shares = [accepted / max(judged, 1) for accepted, judged in counts.values()]
    axes.plot(list(counts), shares, "o-")
    axes.set_ylim(0, 1.1 * max(shares) or 1)
    return figure


def heat_map(results: Results) -> Figure | None:
    """Figure 16: where on the image tokens are accepted."""
    lines = results.of("map", "probe")
    if not lines:
        return None
    accepted, judged = (
        np.array([line[name] for line in lines]).sum(0) for name in ("accepted_at", "judged_at")
    )
    grid = round(len(judged) ** 0.5)
    share = np.divide(accepted, judged, where=judged > 0, out=np.full(len(judged), np.nan))
    figure, axes = new_figure("Accepted share by position", "column", "row")
    axes.grid(False)
    shown = axes.imshow(share.reshape(grid, grid), cmap="viridis", vmin=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, label="accepted per judged token")
    return figure


def resampling_tries(results: Results) -> Figure | None:
    """Figure 15: share of rejected tokens for which the residual gives one within so many draws."""
    found = tries_shares(results)
    if not found:
        return None
    figure, axes = new_figure("Resampling tries", "draws allowed", "resampled per rejected token")
    axes.plot([tries for tries, _, _ in found], [share for _, _, share in found], "o-")
    axes.set(xscale="log", ylim=(0, 1.05))
    axes.minorticks_off()
    axes.set_xticks([tries for tries, _, _ in found], [str(tries) for tries, _, _ in found])
    return figure


def time_by_graph(results: Results) -> Figure | None:
    """Where the time goes, a bar per method."""
    items: list[Summary] = results.serving("readme")
    if not items:
        return None
    figure, axes = new_figure("Where the time goes", "milliseconds per image", "")
    axes.grid(False, axis="y")
    names, left = [textwrap.fill(name_of(item), LABEL) for item in items], np.zeros(len(items))
    lines = len(names) * max(1 + name.count("\n") for name in names)  # bars are equally far apart
    figure.set_size_inches(SIZE[0], max(SIZE[1], 1.4 + 0.19 * lines))
    axes.tick_params(axis="y", labelsize=9)
    for part, starts in PARTS.items():
        width = np.array([seconds_in(item, starts) * 1e3 for item in items])
        if width.any():
            axes.barh(names, width, left=left, label=part, edgecolor="white")
            left += width
    rest = np.array([item.seconds * 1e3 for item in items]) - left
    axes.barh(names, np.maximum(rest, 0), left=left, color=GREY, label="outside", edgecolor="white")
    axes.invert_yaxis()
    figure.legend(fontsize=9, loc="outside lower center", ncols=3)
    return figure


def errors_by_step(parity: dict[str, Any], rung: str) -> Figure | None:
    """How the error grows, step by step, of every backend and member."""
    lines: dict[str, dict[int, float]] = {}
    for row in parity["rows"]:
        words = row["case"].split()
        if row["rung"] == rung and "step" in words and row["error"] is not None:
            step = int(words[words.index("step") + 1])
            errors = lines.setdefault(row["subject"], {})
            errors[step] = max(errors.get(step, 0.0), row["error"])
    if not lines:
        return None
    figure, axes = new_figure(f"Error by step: {rung}", "step", "relative error against PyTorch")
    for subject, errors in lines.items():
        floor = 1e-9  # equal to the bit has no place on a logarithmic axis
        axes.plot(list(errors), [max(e, floor) for e in errors.values()], label=subject)
    tolerance = max(row["tolerance"] for row in parity["rows"]
                    if row["rung"] == rung and row["unit"] == "relative")  # fmt: skip
    axes.axhline(tolerance, color="#c62828", linewidth=1, linestyle="--", label="tolerance")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "pareto": pareto,
    "speed": speed_against_gamma,
    "time": time_by_graph,
    "figure-08-gamma": lambda r: _sweep(r, "figure 8", "gamma", "Acceptance against gamma"),
    "figure-11-along-the-image": acceptance_along_image,
    "figure-13-guidance": lambda r: _sweep(r, "figure 13", "cfg", "Acceptance against guidance"),
    "figure-14-temperature": lambda r: _sweep(
        r, "figure 14", "temperature", "Acceptance against temperature"
    ),
    "figure-15-tries": resampling_tries,
    "figure-16-positions": heat_map,
}
