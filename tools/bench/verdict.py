"""Which method to use, computed from a benchmark: exact, at equal quality, and `cspd`."""

from __future__ import annotations

from cspd.engines.console.table import DASH, Table
from cspd.runtime.commands.tables import ratio_text
from cspd.tools.bench.cells import name_of, output
from cspd.tools.bench.results import Results, Summary
from cspd.tools.judge.bootstrap import half_text
from cspd.tools.judge.scores import difference_text, words

TITLE = "Which method?"
EQUAL = "fastest way at equal quality"
# Scores that decide about quality, and the sign of a difference for the better.
BETTER = {"accuracy": 1, "frechet": -1}


def verdict_table(results: Results) -> Table:
    """A row per question; no row without a measured target."""
    rows = []
    if results.batches(results.main.id):
        reference = results.summary(results.main)
        measured = candidates(results)
        exact = [item for item in measured if output(item, results.main) == "exact"]
        rows.append(
            _row(results, "fastest exact way", _fastest(results, exact, reference), reference)
        )
        equal = [item for item in measured
                 if item.point.id == reference.point.id or no_worse(item, reference)]  # fmt: skip
        if reference.score:
            fastest = _fastest(results, equal, reference)
            rows.append(_row(results, EQUAL, fastest, reference))
        cspd = next((item for item in measured if item.point.config.method == "cspd"), None)
        if cspd is not None:
            rows.append(_row(results, "where cspd stands", cspd, reference))
            rows[-1][1] += f", is {standing(results, cspd, measured)}"
    columns = ("question", "answer", "speed vs target",
               *(f"{words(name)}, difference" for name in BETTER))  # fmt: skip
    note = f"Speed by {results.clock}."
    if any(question == EQUAL for question, *_ in rows):
        note = (
            "Equal quality: no score is worse than the target's beyond the 95 % interval of the "
            "difference, which is drawn image by image from equal noise. The differences say how "
            f"much that leaves open. {note}"
        )
    return Table(TITLE, columns, rows, note if rows else "").filled()


def candidates(results: Results) -> list[Summary]:
    """Settings at the batch size and on the backend of the reference, the plain ones first."""
    shown = {item.point.id: item for tag in ("readme", "pareto") for item in results.serving(tag)}
    main = results.main
    return [item for item in shown.values()
            if item.point.backend == main.backend
            and item.point.config.batch_size == main.config.batch_size]  # fmt: skip


def _fastest(results: Results, items: list[Summary], reference: Summary) -> Summary:
    """The fastest of `items`; the reference itself where that one's lead is within its interval."""
    found = min(items, key=results.cost)
    return reference if _pace(results, found, reference) == 0 else found


def _pace(results: Results, item: Summary, other: Summary) -> int:
    """1 if `item` is faster than `other`, -1 if slower, 0 if their interval holds both."""
    low, high = results.speed_interval(item, other) or [results.speedup(item, other)] * 2
    return (low > 1) - (high < 1)


def standing(results: Results, cspd: Summary, measured: list[Summary]) -> str:
    """`cspd` against the target with fewer steps, the baseline that needs no draft."""
    short = [item for item in measured if item.point.config.method == "target"]
    if not cspd.score:
        same = [item for item in short if item.target_calls == cspd.target_calls]
        return "of unmeasured quality" + "".join(
            f" and {_than(results, cspd, item)} with as many calls" for item in same[:1]
        )
    rivals = [item for item in short if no_worse(item, cspd)]
    if not rivals:
        return "better than every target measured"
    return f"{_than(results, cspd, min(rivals, key=results.cost))} at this quality"


PACES = {1: "faster than", 0: "as fast as", -1: "slower than"}


def _than(results: Results, cspd: Summary, other: Summary) -> str:
    target = f"target --num-iter {other.point.config.num_iter}"
    return f"{PACES[_pace(results, cspd, other)]} {target}"


def no_worse(item: Summary, reference: Summary) -> bool:
    """Whether no score is worse than the reference's beyond its interval; False if unscored."""
    common = [name for name in BETTER if item.difference(reference, name) is not None]
    for name in common:
        _, (low, high) = item.difference(reference, name)  # type: ignore[misc]
        if (high if BETTER[name] > 0 else -low) < 0:
            return False
    return bool(common)


def _row(results: Results, question: str, item: Summary, reference: Summary) -> list[str]:
    return [question, name_of(item), speed_text(results, item, reference),
            *(_difference(item, reference, name) for name in BETTER)]  # fmt: skip


def speed_text(results: Results, item: Summary, reference: Summary) -> str:
    """The speed ratio with half its 95 % interval over the batches."""
    if item.point.id == reference.point.id:
        return "1.00x"
    speed = results.speedup(item, reference)
    ends = results.speed_interval(item, reference)
    return ratio_text(speed, min(item.batches, reference.batches)) + half_text(speed, ends, ".2f")


def _difference(item: Summary, reference: Summary, name: str) -> str:
    found = item.difference(reference, name)
    if found is None or item.point.id == reference.point.id:
        return DASH
    value, ends = found
    return difference_text(name, value, ends)
