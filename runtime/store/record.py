"""Whether a `run.json` says what its run wrote."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from cspd.engines.bundle import Bundle
from cspd.engines.sessions.cuda_graph import GraphStats
from cspd.engines.spec import Record
from cspd.runtime.config import RunConfig
from cspd.runtime.store.formats import Layout
from cspd.runtime.store.outputs import figures, run_record, tally_of
from cspd.runtime.store.seal import CHECK, is_sealed


class Session(Record):
    """The process that finished a run."""

    images: int = Field(ge=0)
    wall_seconds: float = Field(ge=0, allow_inf_nan=False)
    workers: int = Field(ge=1)


class Rest(Record):
    """What neither follows from the settings nor is counted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    host: dict[str, str]
    layout: Layout
    session: Session
    files: dict[str, str]
    cuda_graphs: dict[str, GraphStats] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    choices: dict[str, str] = Field(default_factory=dict)
    baseline: dict[str, Any] | None = None


REST = TypeAdapter(Rest)


def is_believable(record: dict[str, Any], config: RunConfig, bundle: Bundle) -> bool:
    """Whether `record` is what a run of `config` wrote: by its checksum.

    One that was written before records had any must say what follows from its settings and counts,
    and have nothing but values of the right kind elsewhere.
    """
    tally = tally_of(record)
    if tally is None or (CHECK in record and not is_sealed(record)):
        return False
    if CHECK in record:
        return True
    derived = run_record(config, bundle, tally) | {"host": record.get("host")}
    rest = {name: value for name, value in record.items() if name not in derived}
    return _same(record, derived) and _is_rest({"host": derived["host"], **rest})


def _is_rest(rest: dict[str, Any]) -> bool:
    try:
        baseline = REST.validate_python(rest).baseline
    except ValidationError:
        return False
    if baseline is None:
        return "baseline" not in rest
    tally, ratio = tally_of(baseline), baseline.get("speed_ratio")
    if tally is None or not (ratio is None or _is_number(ratio)):
        return False
    return _same(baseline, {"method": "target", **figures(tally), "speed_ratio": ratio})


def _same(record: dict[str, Any], derived: dict[str, Any]) -> bool:
    """Whether `record` has what was `derived` from it, but for the mean of its distances."""
    mean = record["statistics"].get("mean_distance")
    known = derived | {"statistics": derived["statistics"] | {"mean_distance": mean}}
    return (mean is None or _is_number(mean)) and {**record, **known} == record


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf  # type: ignore[operator]
