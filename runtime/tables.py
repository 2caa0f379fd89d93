"""What the command line shows on a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from cspd.engines.bundle import Bundle
from cspd.engines.doctor import Diagnosis
from cspd.runtime.run import Outcome
from cspd.runtime.stats import Tally


def outcome_table(outcomes: list[Outcome], bundle: Bundle) -> Table:
    """A line per method: images, time, acceptance, calls, speed against the target alone."""
    baseline = next((o.tally for o in outcomes if o.config.method == "target"), None)
    title = "synthetic weights: images mean nothing" if bundle.manifest.synthetic else None
    table = Table(
        "method", "images", "seconds", "accepted", "target\nrounds", "target\ncalls",
        "draft\ncalls", "speed vs\ntarget", title=title,
    )  # fmt: skip
    for column in table.columns:
        column.no_wrap = True
    for outcome in outcomes:
        tally = outcome.tally
        rate = tally.statistics.verdicts.acceptance_rate
        table.add_row(
            outcome.config.method,
            str(tally.images),
            f"{tally.seconds:.2f}",
            "-" if rate is None else f"{rate:.1%}",
            str(tally.statistics.target_rounds),
            str(tally.statistics.target_calls),
            str(tally.statistics.draft_calls),
            _speed(tally, baseline),
        )
    return table


def _speed(tally: Tally, baseline: Tally | None) -> str:
    """Images per second against those of `baseline`, each of one run."""
    if baseline is None or not (baseline.images and tally.images and tally.seconds):
        return "-"
    if tally is baseline:
        return "1.00x"
    return ratio_text(baseline.seconds / baseline.images * tally.images / tally.seconds, 1)


def ratio_text(value: float, runs: int) -> str:
    """A ratio of times that were each measured `runs` times: one run does not give two digits."""
    return f"{value:.2f}x" if runs > 1 else f"about {value:.1f}x"


def doctor_table(diagnosis: Diagnosis) -> Group:
    """What is installed, what each backend can do, and the command that fixes what fails."""
    checks = Table("", "found", "fix with", title="this machine", title_justify="left")
    for check in diagnosis.checks:
        checks.add_row(check.subject, escape(check.found), escape(check.fix or ""))
    backends = Table(
        "backend", "builds", "runs", "why", "fix with", title="backends", title_justify="left"
    )
    for report in diagnosis.backends:
        yes_no = ("yes" if can else "no" for can in (report.builds, report.runs))
        backends.add_row(report.name, *yes_no, escape(report.reason), escape(report.fix or ""))
    return Group(checks, backends)
