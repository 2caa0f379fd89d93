"""What the command line shows on a terminal."""

from __future__ import annotations

from rich.markup import escape

from cspd.engines.bundle import Bundle
from cspd.engines.console.table import DASH, Table
from cspd.engines.doctor import Diagnosis
from cspd.runtime.commands.run import Outcome
from cspd.runtime.decode.stats import Tally


def outcome_table(outcomes: list[Outcome], bundle: Bundle) -> Table:
    """A line per method: images, time, acceptance, calls, speed against the target alone."""
    baseline = next((o.tally for o in outcomes if o.config.method == "target"), None)
    rows = []
    for outcome in outcomes:
        tally = outcome.tally
        rate = tally.statistics.verdicts.acceptance_rate
        rows.append([
            outcome.config.method, str(tally.images), f"{tally.seconds:.2f}",
            DASH if rate is None else f"{rate:.1%}", str(tally.statistics.target_rounds),
            str(tally.statistics.target_calls), str(tally.statistics.draft_calls),
            _speed(tally, baseline),
        ])  # fmt: skip
    columns = ("method", "images", "seconds", "accepted", "target rounds", "target calls",
               "draft calls", "speed vs target")  # fmt: skip
    title = "SYNTHETIC weights: images mean nothing" if bundle.manifest.synthetic else ""
    return Table(title, columns, rows).filled()


def _speed(tally: Tally, baseline: Tally | None) -> str:
    """Images per second against those of `baseline`, each of one run."""
    if baseline is None or not (baseline.images and tally.images and tally.seconds):
        return DASH
    if tally is baseline:
        return "1.00x"
    return ratio_text(baseline.seconds / baseline.images * tally.images / tally.seconds, 1)


def ratio_text(value: float, runs: int) -> str:
    """A ratio of times that were each measured `runs` times: one run does not give two digits."""
    return f"{value:.2f}x" if runs > 1 else f"about {value:.1f}x"


def doctor_tables(diagnosis: Diagnosis) -> list[Table]:
    """What is installed, and what each backend can do."""
    checks = [[check.subject, escape(check.found)] for check in diagnosis.checks]
    backends = [
        [report.name, *("yes" if can else "no" for can in (report.builds, report.runs)),
         escape(report.reason)]
        for report in diagnosis.backends
    ]  # fmt: skip
    return [
        Table("This machine", ("", "found"), checks),
        Table("Backends", ("backend", "builds", "runs", "why"), backends),
    ]


def fixes(diagnosis: Diagnosis) -> list[str]:
    """A line per command that fixes something, whole, so that it can be copied."""
    subjects: dict[str, str] = {}
    for check in diagnosis.checks:
        subjects.setdefault(check.fix or "", check.subject)
    for report in diagnosis.backends:
        subjects.setdefault(report.fix or "", report.name)
    subjects.pop("", None)
    width = max(map(len, subjects.values()), default=0)
    return [f"{subject:{width}}  {fix}" for fix, subject in subjects.items()]
