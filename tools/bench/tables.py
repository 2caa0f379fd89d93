"""Tables and figure data of a benchmark, from the lines of its journal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cspd.engines.console.table import Table
from cspd.tools.bench.cells import figure, host_note, name_of, output, percent, ratio, seconds
from cspd.tools.bench.results import Results
from cspd.tools.bench.times import start_table, time_table


def readme_table(results: Results) -> Table:
    """Every method beside the honest baselines."""
    main, rows = results.main, []
    reference = results.summary(main) if results.batches(main.id) else None
    cspd = next(iter(results.serving("readme", method="cspd")), None)
    for item in results.serving("readme"):
        equal = cspd is not None and item.point.config.method == "target" and (
            item.target_calls == cspd.target_calls
        )  # fmt: skip
        rows.append([
            name_of(item) + (" (as many target calls as cspd)" if equal else ""),
            output(item, main), seconds(item), ratio(results, item, reference),
            percent(item.acceptance), f"{item.target_rounds:.0f}",
            f"{item.target_calls:.0f}", f"{item.draft_calls:.0f}",
            item.scored("accuracy"), item.scored("frechet"),
        ])  # fmt: skip
    counts = sorted({int(item.score["n"]) for item in results.serving("readme") if item.score})
    columns = (
        "method", "output", "seconds per image", "speed vs target", "acceptance",
        "target rounds", "target calls", "draft calls", "classifier accuracy",
        f"Frechet distance{_n(counts)}",
    )  # fmt: skip
    return Table("Methods side by side", columns, rows, host_note(results)).filled()


def _n(counts: list[int]) -> str:
    return f" (n = {', '.join(map(str, counts))})" if counts else ""


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
            figure(item.score.get("n"), "d"), item.scored("accuracy"),
            item.scored("frechet"),
            item.scored("inception_score"), item.scored("precision"), item.scored("recall"),
            seconds(item),
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
            name_of(item), output(item, results.main), seconds(item),
            ratio(results, item, reference),
            item.scored("accuracy"), item.scored("frechet"),
            figure(item.score.get("n"), "d"),
        ]
        for item in sorted(results.serving("pareto"), key=results.cost)
        if item.score
    ]  # fmt: skip
    columns = ("method", "output", "seconds per image", "speed vs target", "accuracy",
               "Frechet distance", "n")  # fmt: skip
    return Table("Quality against time", columns, rows).filled()


def tries_table(results: Results) -> Table:
    """Figure 15: how often the residual distribution yields a token within so many draws."""
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
