"""Tables of an evaluation, from its record."""

from __future__ import annotations

from typing import Any

from cspd.engines.console.table import DASH, Table
from cspd.tools.judge.scores import difference_text, text, words


def score_table(record: dict[str, Any]) -> Table:
    """Mean over the seeds with its interval, a row per setting."""
    names = list(dict.fromkeys(row["score"] for row in record["spread"] if row["score"] != "n"))
    settings = list(dict.fromkeys(row["setting"] for row in record["spread"]))
    cells = {(row["setting"], row["score"]): row for row in record["spread"]}
    rows = []
    for setting in settings:
        seeds = cells[setting, names[0]]["seeds"]
        found = [cells[setting, name] for name in names]
        figures = [text(row["score"], row["mean"], row["interval"]) for row in found]
        rows.append([setting, str(record["n"]), str(seeds), *figures])
    note = (
        f"{words('frechet')}: {record['frechet_name']}. Judge: {record['judge']['name']}, "
        f"extractor {record['judge']['extractor_sha256'][:12]}, statistics "
        f"{record['judge']['statistics_sha256'][:12]}. ± {record['intervals']}; a score without it "
        "has none."
    )
    if record["bundle"]["synthetic"]:
        note = "SYNTHETIC random weights: these figures mean nothing. " + note
    return Table("Scores", ("setting", "images", "seeds", *map(words, names)), rows, note)


def paired_table(record: dict[str, Any]) -> Table:
    """Image-by-image differences and those of the scores, a row per pair of sets."""
    names = list(dict.fromkeys(name for row in record["paired"] for name in row["differences"]))
    rows = [
        [row["setting"], row["comparison"], str(row["seed"]), f"{row['rmse']:.4f}",
         f"{row['psnr_db']:.1f}", f"{row['identical']:.1%}", f"{row['shift']:+.4f}",
         *(_difference(name, row["differences"].get(name)) for name in names)]
        for row in record["paired"]
    ]  # fmt: skip
    columns = ("setting", "against the first setting", "seed", "RMSE", "median PSNR, dB",
               "identical", "brightness shift",
               *(f"{words(name)}, difference" for name in names))  # fmt: skip
    note = (
        "Sets with one seed start from the same noise, image by image: they are paired, not "
        f"independent, and their differences are surer than their scores. ± {record['intervals']}."
    )
    return Table("Paired differences", columns, rows, note)


def _difference(name: str, found: dict[str, Any] | None) -> str:
    return DASH if found is None else difference_text(name, found["value"], found["interval"])


def tables(record: dict[str, Any]) -> list[Table]:
    """The tables of an evaluation; differences only if it has a pair."""
    return [score_table(record)] + ([paired_table(record)] if record["paired"] else [])
