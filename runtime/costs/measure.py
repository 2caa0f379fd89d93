"""Measured costs of a model's head, kept per bundle, backend and machine; what they recommend."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator

from cspd.engines.bundle import Bundle
from cspd.engines.cpus import available_cpus
from cspd.engines.errors import CspdError
from cspd.engines.manifest import Role
from cspd.engines.schedule import Schedule, make_schedule
from cspd.engines.spec import Record
from cspd.runtime.config import RunConfig
from cspd.runtime.costs.predict import PRIOR_WEIGHT, CostRecord, Forecast, cost_key, measure_costs
from cspd.runtime.decode.alone import Alone
from cspd.runtime.decode.decoder import decode
from cspd.runtime.decode.member import Member
from cspd.runtime.decode.setup import make_batch, make_sampler
from cspd.runtime.heads.base import Head, HeadSample, Rows
from cspd.runtime.heads.open_heads import OpenHeads
from cspd.runtime.heads.speculation import SpeculationOptions, SpeculationStats, SpeculativeSample
from cspd.runtime.heads.steps import HeadSteps
from cspd.runtime.noise import Noise, Purpose

# Around what keeps a person waiting; it is told what that is.
Working = Callable[[str], AbstractContextManager[object]]
EXAMPLE_STEPS = 4  # autoregressive steps of the image whose conditions are measured with
LIBRARIES = ("torch", "numpy", "onnxruntime", "tensorrt", "tensorrt-rtx-cu12")


class HeadCosts(Record):
    """Costs of one head and the share of its drafts that passed, by step.

    `no_table` has the costs without a table of modulations, where engines can do with and without.
    """

    role: Role
    guided: bool
    costs: CostRecord
    no_table: CostRecord | None = None
    acceptance: tuple[Annotated[float, Field(ge=0, le=1)], ...]

    @model_validator(mode="after")
    def _of_one_chain(self) -> HeadCosts:
        steps = {record.num_steps for record in (self.costs, self.no_table) if record is not None}
        if steps != {len(self.acceptance)}:
            raise ValueError(f"shares of {len(self.acceptance)} steps, costs of {sorted(steps)}")
        return self

    @property
    def forecasts(self) -> dict[bool, Forecast]:
        """By whether modulations are looked up in a table; False only if that was measured."""
        costs = {True: self.costs, False: self.no_table}
        share = np.array(self.acceptance)
        return {table: Forecast(c, share) for table, c in costs.items() if c is not None}


def measured_steps(config: RunConfig) -> int:
    """Denoising steps that costs are measured for: of annealed ones their middle."""
    steps = HeadSteps.parse(config.head_steps)
    return (steps.first + steps.last) // 2


def facts(heads: OpenHeads, role: Role, config: RunConfig) -> dict[str, str]:
    """Everything that a measurement depends on."""
    sessions = heads.sessions
    found = {
        "bundle": heads.bundle.sha256, "backend": sessions.backend, "device": sessions.device,
        "threads": str(sessions.threads or available_cpus()), "role": role,
        "guided": str(config.cfg != 1), "head_steps": str(measured_steps(config)),
        "machine": _machine(), "tool": importlib.metadata.version("cspd"), "measured": "table",
        "modulation_memory": str(config.modulation_memory), "cpus": str(available_cpus()),
    }  # fmt: skip
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _machine() -> str:
    """Names of processor and GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def folders(bundle: Bundle) -> list[Path]:
    """Where costs of `bundle` are kept, the preferred folder first.

    Beside the bundle, unless it is the one inside the package; else in the user's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    user = cache / "cspd" / "tuned" / bundle.sha256[:16]
    if bundle.shipped:
        return [user]
    return [bundle.folder.resolve().parent / f"{bundle.folder.resolve().name}.tuned", user]


def save(bundle: Bundle, found: HeadCosts) -> Path:
    """Write `found` to the first folder that can be written to."""
    for folder in folders(bundle):
        path = folder / _file_name(found.role, found.costs.key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(found.model_dump_json(indent=1) + "\n")
            temporary.replace(path)
        except OSError:
            continue
        return path
    raise CspdError(
        f"{folders(bundle)[-1]}: cannot write measured costs there; set XDG_CACHE_HOME to a "
        "folder that can be written to"
    )


def load(bundle: Bundle, role: str, key: str) -> HeadCosts | None:
    """Saved costs, None if there are none; CspdError if the file is not what it should be."""
    for folder in folders(bundle):
        path = folder / _file_name(role, key)
        if not path.is_file():
            continue
        try:
            found = HeadCosts.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CspdError(
                f"{path}: not a record of costs ({_reason(error)}); delete it, or measure again: "
                "cspd-run tune"
            ) from None
        for costs in (found.costs, found.no_table or found.costs):
            costs.require(key)
        return found
    return None


def _reason(error: OSError | ValidationError) -> str:
    """What is wrong with a file, in a few words."""
    if isinstance(error, OSError):
        return str(error.strerror)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def _file_name(role: str, key: str) -> str:
    return f"{role}-{key[:16]}.json"


def tuned(
    heads: OpenHeads, role: Role, config: RunConfig, working: Working = nullcontext
) -> HeadCosts:
    """Costs of the head of `role`: saved ones, or measured now, with a word to `working`."""
    found = saved(heads, role, config)
    if found is None:
        with working(f"measuring the {role} head, once per machine"):
            found = measure(heads, role, config)
        save(heads.bundle, found)
    return found


def saved(heads: OpenHeads, role: Role, config: RunConfig) -> HeadCosts | None:
    """Costs of the head of `role` that were measured before."""
    return load(heads.bundle, role, cost_key(facts(heads, role, config)))


@dataclass
class Examples:
    """Rows of real conditions, recorded from one image; every call gives other ones."""

    recorded: list[Rows] = field(default_factory=list)
    calls: int = 0

    @classmethod
    def of(cls, heads: OpenHeads, role: Role, config: RunConfig) -> Examples:
        """Conditions of an image that the model of `role` itself makes in few steps."""
        examples = cls()
        manifest, device = heads.bundle.manifest, heads.sessions.device
        few = min(EXAMPLE_STEPS, manifest.geometry.num_tokens)
        changes = {"batch_size": 1, "head_steps": measured_steps(config), "num_iter": few}
        config = config.model_copy(update=changes)
        head = heads.plain(role, config.modulation_memory << 20)
        member = Member(role, heads.sessions(f"{role}/backbone"), examples._record(head))
        sampler = make_sampler(manifest, config, device)
        alone = Alone(sampler, member, manifest.geometry.token_dim)
        decode(alone, make_batch(manifest, config, [0], device))
        return examples

    def _record(self, head: Head) -> Head:
        def recording(rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose) -> HeadSample:
            self.recorded.append(rows)
            return head(rows, schedule, noise, purpose)

        return recording

    def __call__(self, tokens: int) -> Rows:
        """Rows of `tokens` tokens with noise of their own."""
        count = sum(len(rows.images) for rows in self.recorded)
        self.calls += 1
        index = (torch.arange(tokens) + 7 * self.calls) % count
        conditions = torch.cat([rows.conditions for rows in self.recorded], dim=1)
        names = ("guidance", "temperature", "images", "positions")
        columns = {n: torch.cat([getattr(rows, n) for rows in self.recorded]) for n in names}
        taken = Rows(conditions, **columns).take(index)
        # Other numbers than those of the image, and no two tokens alike.
        images = torch.arange(tokens, device=taken.images.device) + self.calls * tokens
        return Rows(taken.conditions, taken.guidance, taken.temperature, images, taken.positions)


def measure(heads: OpenHeads, role: Role, config: RunConfig) -> HeadCosts:
    """Measure the head of `role` on conditions of an image that the model itself begins."""
    key, steps = cost_key(facts(heads, role, config)), measured_steps(config)
    examples = Examples.of(heads, role, config)
    schedule = make_schedule(heads.bundle.manifest.schedule, steps).to(heads.sessions.device)
    noise, most = Noise(config.seed, heads.sessions.device), heads.most_rows(role)
    totals = np.zeros((2, steps))

    def keep(stats: SpeculationStats) -> None:
        totals[:] += stats.tested, stats.accepted

    def costs(memory: int) -> CostRecord:
        def speculative(window: int, rows: int | None) -> Head:
            buckets = () if rows is None else (max(window, min(most, rows)),)
            options = SpeculationOptions(window, row_buckets=buckets, max_rows=most)
            return heads.speculative(role, options, memory)

        ways = Ways(heads.plain(role, memory), speculative, keep)
        return measure_heads(ways, examples, schedule, noise, key)

    on_table = costs(config.modulation_memory << 20)
    no_table = costs(0) if heads.has_tables(role) else None
    tested, accepted = totals
    share = (accepted + PRIOR_WEIGHT / 2) / (tested + PRIOR_WEIGHT)
    return HeadCosts(
        role=role, guided=config.cfg != 1, costs=on_table, no_table=no_table,
        acceptance=tuple(share.tolist()),
    )  # fmt: skip


@dataclass(frozen=True)
class Ways:
    """Stepping by `plain`, and speculation by `speculative(window, rows)`.

    Calls of the second have `rows` rows each, if that is given; `keep` hears what they counted.
    """

    plain: Head
    speculative: Callable[[int, int | None], Head]
    keep: Callable[[SpeculationStats], None] = lambda stats: None


def measure_heads(
    ways: Ways, example: Callable[[int], Rows], schedule: Schedule, noise: Noise, key: str,
    clock: Callable[[], float] = time.perf_counter,
) -> CostRecord:  # fmt: skip
    """Costs of both `ways` on `example(tokens)` rows, whole calls of the head."""

    def timed(head: Head, tokens: int) -> tuple[HeadSample, float]:
        rows, start = example(tokens), clock()
        sampled = head(rows, schedule, noise, Purpose.DENOISE)
        return sampled, 1000 * (clock() - start)

    def speculated(head: Head, tokens: int) -> tuple[SpeculationStats, float]:
        sampled, spent = timed(head, tokens)
        assert isinstance(sampled, SpeculativeSample)
        ways.keep(sampled.stats)
        return sampled.stats, spent

    def round_of(tokens: int, window: int) -> tuple[float, float]:
        stats, spent = speculated(ways.speculative(window, None), tokens)
        return stats.rows / stats.calls, spent / stats.calls

    def whole(tokens: int, window: int) -> float:
        return speculated(ways.speculative(window, tokens * window), tokens)[1]

    def step(tokens: int) -> float:
        return timed(ways.plain, tokens)[1]

    return measure_costs(step, round_of, whole, key=key, num_steps=schedule.num_steps)
