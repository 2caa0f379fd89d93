"""`cspd-run tune`: measure once what the heads cost here, for `--method lossless`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cspd.engines.console.commands import Verb, finish, json_option
from cspd.engines.console.table import Table
from cspd.engines.console.terminal import print_table
from cspd.engines.machine import check_machine
from cspd.engines.words import counted, shell
from cspd.runtime.commands.options import FOLDER, machine_options, setting_option
from cspd.runtime.config import RunConfig, check_config
from cspd.runtime.costs.choose import Explained, choose, choose_table
from cspd.runtime.costs.measure import HeadCosts, measure, save
from cspd.runtime.costs.predict import WHOLE_WINDOWS, CostRecord, Forecast, cost_at
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.progress import working
from cspd.runtime.sessions import Sessions
from cspd.runtime.settings import configure, shipped_bundle, usable_bundle

MAX_ROWS = 1 << 30  # the table shows what is cheapest, whatever fits into one call


def tune(pipeline: Pipeline, config: RunConfig) -> dict[Path, HeadCosts]:
    """Measure the heads of all models of the bundle again; what was found, by the file it is in."""
    found = {}
    for role in sorted(pipeline.bundle.manifest.models):
        with working(f"measuring the {role} head"):
            costs = measure(pipeline.heads, role, config)
        found[save(pipeline.bundle, costs)] = costs
    return found


def cost_table(found: HeadCosts) -> Table:
    """A line per number of tokens: what was measured, and what a reproducible run then does.

    Where modulations can be looked up in a table, costs with it stand before those without.
    """
    guided = "with guidance" if found.guided else "without guidance"
    both = "" if found.no_table is None else ", with / without a table of modulations"
    title = f"{found.role} head, {found.costs.num_steps} steps, {guided}{both}, ms"
    windows = (f"window {window}" for window in WHOLE_WINDOWS)
    rows = []
    measured = [found.costs] if found.no_table is None else [found.costs, found.no_table]
    for tokens, _ in found.costs.plain:
        ways = zip(*(_chains(costs, tokens) for costs in measured), strict=True)
        cells = (" / ".join(f"{ms:.2f}" for ms in costs) for costs in ways)
        rows.append([f"{tokens:g}", *cells, _choice(found, int(tokens))])
    return Table(title, ("tokens together", "stepping", *windows, "choice"), rows)


def _chains(costs: CostRecord, tokens: float) -> list[float]:
    """Milliseconds of whole chains for `tokens` tokens: stepping, then every measured window."""
    ways = (costs.plain, *(costs.chains(window) for window in WHOLE_WINDOWS))
    return [float(cost_at(points, tokens)) for points in ways]


def _choice(found: HeadCosts, tokens: int) -> str:
    """What is cheapest for `tokens` tokens together, in words."""

    def best(forecast: Forecast) -> Explained:
        return choose(found.role, forecast, [tokens], fixed=True, max_rows=MAX_ROWS, window=None)

    ways = {table: best(forecast) for table, forecast in found.forecasts.items()}
    choice = choose_table(ways).choice
    way = f"window {choice.window}" if choice.up_to else "stepping"
    return way if found.no_table is None else f"{way}, {'table' if choice.table else 'no table'}"


@click.command("tune", cls=Verb, example="cspd-run tune\ncspd-run tune bundles/mar-h-b --cfg 1")
@click.argument("bundle", type=FOLDER, required=False)
@setting_option("head_steps")
@setting_option("cfg")
@setting_option("backend")
@machine_options
@json_option
def command(bundle: Path | None, device: str, threads: int, as_json: bool, **sampling: Any) -> None:
    """Measure what the heads of BUNDLE cost on this machine, by default of the shipped pair.

    Costs are kept beside the bundle, or in the user's cache folder where that is not possible, and
    hold for this bundle, backend, machine and these versions only.
    """
    opened = usable_bundle(bundle or shipped_bundle())
    config = configure(opened, None, sampling)
    check_config(config, opened.manifest)
    check_machine(opened, config.backend, device)
    found = tune(Pipeline(Sessions(opened, config.backend, device, threads)), config)
    for record in () if as_json else found.values():
        print_table(cost_table(record))
    places = sorted({click.format_filename(path.parent) for path in found})
    again = ["cspd-run", "generate", *([str(bundle)] if bundle else []), "--method", "lossless"]
    finish(
        as_json, {"heads": [record.model_dump(mode="json") for record in found.values()]},
        list(found), f"costs of {counted(len(found), 'head')} in {', '.join(places)}",
        f"next: {shell(*again)}",
    )  # fmt: skip
