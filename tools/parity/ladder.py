"""What the rungs of the parity ladder share: reference, backends, recorded inputs, chains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cspd.engines.backends import BACKENDS, ENGINES
from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.manifest import Role
from cspd.engines.schedule import Schedule, make_schedule
from cspd.engines.sessions.session import Session, TorchSession
from cspd.engines.spec import GraphSpec
from cspd.export.graphs.denoiser import DenoiserGraph
from cspd.export.graphs.modulation import HoistedDenoiserGraph
from cspd.export.graphs.networks import FIRST, HOISTED, HOISTED_ROUND, MODULATION, ROUND
from cspd.export.mar.assemble import assemble_mar
from cspd.export.mar.presets import MarConfig
from cspd.export.verify import realistic_inputs
from cspd.runtime.config import RunConfig
from cspd.runtime.costs.sizes import DEFAULT_WINDOW
from cspd.runtime.heads.base import Rows
from cspd.runtime.heads.open_heads import OpenHeads
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.heads.steps import HeadSteps
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.tools.parity.hoisted import few_rows, on_table
from cspd.tools.parity.measure import Skipped
from cspd.tools.probe import Recorder, call, record_inputs, wrapping

Inputs = dict[str, Tensor]
Case = tuple[str, Inputs]
StepSession = Callable[[int], Session]  # the session that takes a denoising step
# Graphs whose inputs are related to each other, so that only recorded ones make sense.
RELATED_INPUTS = (ROUND, HOISTED_ROUND, "speculative_loop")
EVERY_RUNG = "all"  # the rung of a candidate that cannot run at all
RECORDED = 3  # recorded calls compared per graph: the first, one in the middle, the last


@dataclass(frozen=True)
class Candidate:
    """A backend on a device, compared with the reference."""

    backend: str
    device: str

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.backend} {self.device}"


def candidates(wanted: tuple[str, ...]) -> tuple[Candidate, ...]:
    """The backends of `wanted`, all but the reference if empty, on the devices they may run on."""
    found = []
    for backend in wanted or [name for name in BACKENDS if name != "torch"]:
        devices = {"tensorrt": ["cuda"], "tensorrt-rtx": ["cuda"]}.get(backend, ["cpu", "cuda"])
        found += [Candidate(backend, device) for device in devices]
    return tuple(found)


@dataclass(frozen=True)
class Ladder:
    """What is compared: the networks of `bundle` in a run of `config`, on the backends `wanted`.

    `seeds` random inputs are drawn per size; `budget` limits one random call, in 1e9 operations.
    PyTorch, the reference, runs on `device`.
    """

    bundle: Bundle
    config: RunConfig
    wanted: tuple[Candidate, ...]
    seeds: int = 2
    budget: float = 20.0
    device: str = "cpu"

    @cached_property
    def schedule(self) -> Schedule:
        """The denoising schedule of the run."""
        return make_schedule(
            self.bundle.manifest.schedule, HeadSteps.parse(self.config.head_steps).first
        )

    @cached_property
    def recorded(self) -> dict[str, list[Inputs]]:
        """Inputs that a real run gave to each graph, a few calls of each."""
        method = "cspd" if "draft" in self.bundle.manifest.models else "target"
        config = self.config.model_copy(update={"method": method})
        calls = {
            k: _spread(v) for k, v in record_inputs(self.bundle, [config], self.device).items()
        }
        for role, model in self.bundle.manifest.models.items():
            if "denoiser_loop" in model.graphs:
                chain = calls[f"{role}/denoiser_loop"][-1]
                steps = [inputs for inputs, _ in walk(self.reference_steps(role), chain)]
                calls[f"{role}/denoiser"] = _spread(steps)
            if ROUND in model.graphs:
                calls |= self._record_rounds(role, calls[f"{role}/denoiser"][-1])
            if MODULATION in model.graphs:
                calls |= self._hoisted(role, calls[f"{role}/denoiser"])
        return calls

    def _hoisted(self, role: Role, steps: list[Inputs]) -> dict[str, list[Inputs]]:
        """Inputs of the hoisted graphs of `role` for the tokens of recorded `steps`.

        Empty if they do not take the schedule.
        """
        modulate = self.reference(f"{role}/{MODULATION}")
        if not self.takes_schedule(modulate.spec):
            return {}
        steps = [few_rows(inputs) for inputs in steps]
        rounds = self._record_rounds(role, steps[-1])[f"{role}/{ROUND}"]
        whole = {HOISTED: steps, HOISTED_ROUND: rounds}
        found = {
            f"{role}/{name}": [on_table(modulate, inputs) for inputs in calls]
            for name, calls in whole.items()
        }
        asked = [{name: c[name] for name in ("conditions", "schedule")} for c in steps]
        return {**found, f"{role}/{MODULATION}": asked}

    def _record_rounds(self, role: Role, step: Inputs) -> dict[str, list[Inputs]]:
        """Inputs of speculation of `role`, which samples the tokens of one recorded step.

        Once in single rounds, and once in the loop where the bundle has one.
        """
        recorder, count = Recorder(), len(step["x"])
        open_heads = OpenHeads(Sessions(self.bundle, "torch", opener=wrapping(recorder.wrap)))
        options = SpeculationOptions(DEFAULT_WINDOW, max_rows=open_heads.most_rows(role))
        session = open_heads.sessions(f"{role}/{ROUND}")
        channels = self.bundle.manifest.geometry.token_dim
        heads = (
            SpeculativeHead(session, options, channels), open_heads.speculative(role, options),
        )  # fmt: skip
        rows = Rows(
            step["conditions"], step["guidance"], torch.full((count,), self.config.temperature),
            torch.zeros(count, dtype=torch.int64), torch.arange(count),
        )  # fmt: skip
        for head in heads:
            head(rows, self.schedule, Noise(self.config.seed), Purpose.DENOISE)
        return {label: _spread(calls) for label, calls in recorder.calls.items()}

    @cached_property
    def sessions(self) -> dict[Candidate, Sessions]:
        """Sessions with every graph open, by candidate; only of candidates that can run here."""
        opened = ((c, self._open(c)) for c in self.wanted)
        return {c: sessions for c, sessions in opened if not isinstance(sessions, str)}

    @property
    def skipped(self) -> list[Skipped]:
        """Candidates that cannot run here, with the reason."""
        opened = ((c, self._open(c)) for c in self.wanted if c not in self.sessions)
        return [
            Skipped(EVERY_RUNG, c.name, reason) for c, reason in opened if isinstance(reason, str)
        ]

    def _open(self, candidate: Candidate) -> Sessions | str:
        """Sessions of every graph, or the reason why the candidate cannot run."""
        if candidate.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        backend, device = candidate.backend, candidate.device
        sessions = Sessions(self.bundle, backend, device)
        try:
            for label, graph in self.bundle.manifest.graphs().items():
                if graph.spec.engines or backend not in ENGINES:
                    sessions(label)
        except CspdError as error:
            return str(error)
        return sessions

    def pipelines(self) -> Iterator[tuple[str, Pipeline]]:
        """A pipeline for every candidate that can run here, with its name."""
        for candidate, sessions in self.sessions.items():
            yield candidate.name, Pipeline(sessions)

    @cached_property
    def as_built(self) -> Sessions:
        """PyTorch in the precision of the bundle."""
        return Sessions(self.bundle, "torch", self.device)

    def reference(self, label: str) -> Session:
        """PyTorch in float32 with the weights that the graph has in the bundle."""
        role, _, name = label.partition("/")
        model = self.bundle.manifest.models.get(role)  # type: ignore[call-overload]
        exact = ("backbone", "denoiser", HOISTED)
        if model is None or model.precision == "fp32" or name not in exact:
            return self.as_built(label)
        spec = self.bundle.graph(label).spec
        module = self.modules(role, "fp32")[name]
        return TorchSession(spec, module, torch.device(self.device))

    def modules(self, role: str, precision: str) -> dict[str, nn.Module]:
        """The transformer and the denoising steps of `role`, computing in `precision`."""
        model = self.bundle.manifest.models[role]  # type: ignore[index]
        state = load_file(self.bundle.file(model.weights))
        network = assemble_mar(MarConfig(**model.config), state, precision)
        head = network.diffloss
        steps = {"denoiser": DenoiserGraph(head), HOISTED: HoistedDenoiserGraph(head)}
        return {"backbone": network, **steps}

    def reference_pipeline(self) -> Pipeline:
        """A pipeline that runs the reference."""

        def opener(_: Bundle, label: str, *__: str, **___: str | int) -> Session:
            return self.reference(label)

        return Pipeline(Sessions(self.bundle, "torch", self.device, opener=opener))

    def reference_steps(self, role: str) -> StepSession:
        """The reference's session for every denoising step."""
        session = self.reference(f"{role}/denoiser")
        return lambda step: session

    def candidate_steps(self, candidate: Candidate, role: str) -> StepSession:
        """A candidate's session for each denoising step; in low precision the first has its own."""
        sessions = self.sessions[candidate]
        usual = sessions(f"{role}/denoiser")
        first = sessions.opened.get(f"{role}/{FIRST}", usual)
        return lambda step: first if step == self.schedule.num_steps - 1 else usual

    def chains(self, role: str) -> list[Inputs]:
        """Inputs of denoising chains, as for `denoiser_loop`, with conditions of a real run."""
        if loops := self.recorded.get(f"{role}/denoiser_loop"):
            return loops
        return [self._chain(inputs) for inputs in self.recorded.get(f"{role}/denoiser", [])]

    def _chain(self, step: Inputs) -> Inputs:
        generator = torch.Generator().manual_seed(self.config.seed)
        shape = step["x"].shape
        return {
            "noise0": torch.randn(shape, generator=generator),
            "noise": torch.randn(self.schedule.num_steps, *shape, generator=generator),
            "conditions": step["conditions"],
            "guidance": step["guidance"],
            "temperature": torch.full(shape[:1], self.config.temperature),
            "schedule": self.schedule.table,
        }

    def tolerance(self, label: str) -> float:
        """Largest tolerance among the outputs of graph `label`."""
        outputs = self.bundle.graph(label).spec.outputs
        return max(output.tolerance or 0.0 for output in outputs)

    def takes_schedule(self, spec: GraphSpec) -> bool:
        """Whether the graph is for as many denoising steps: tables of modulations are limited."""
        return "steps" not in spec.axes or self.schedule.num_steps <= spec.axes["steps"].max

    def random_cases(self, label: str) -> Iterator[Case]:
        """Random inputs at the smallest, an odd, the usual and the largest sizes in the budget."""
        spec = self.bundle.graph(label).spec
        if spec.name in RELATED_INPUTS or not self.takes_schedule(spec):
            return
        odd = {name: min(max(axis.min, 3), axis.max) for name, axis in spec.axes.items()}
        sizes = {which: spec.sizes(which) for which in ("min", "opt", "max")} | {"odd": odd}
        for which, wanted in sizes.items():
            fitting = within(spec, wanted, self.budget, self.schedule.num_steps)
            text = " ".join(f"{name}={size}" for name, size in fitting.items() if name != "steps")
            for seed in range(self.seeds):
                inputs = realistic_inputs(spec, fitting, self.schedule, seed)
                yield f"{which} {text} seed {seed}", inputs

    def recorded_cases(self, label: str) -> Iterator[Case]:
        """Inputs of real calls."""
        for number, inputs in enumerate(self.recorded.get(label, [])):
            yield f"recorded call {number}", inputs


def _spread(calls: list[Inputs]) -> list[Inputs]:
    """The first, the last and calls evenly between, `RECORDED` in all."""
    if len(calls) <= RECORDED:
        return calls
    return [calls[round(i * (len(calls) - 1) / (RECORDED - 1))] for i in range(RECORDED)]


def within(spec: GraphSpec, sizes: dict[str, int], budget: float, steps: int) -> dict[str, int]:
    """`sizes` with the batch or the rows halved until one call needs `budget` 1e9 operations.

    The estimate: 1e7 operations per row of the first input, and per step of a loop.
    """
    sizes = dict(sizes)
    each = 1e-2 * (steps if not spec.capturable else 1)
    axes = [name for name in ("batch", "rows", "tokens") if name in sizes]
    while math.prod(spec.inputs[0].sizes(sizes)[:-1]) * each > budget:
        for name in axes:
            sizes[name] = max(spec.axes[name].min, sizes[name] // 2)
        if all(sizes[name] == spec.axes[name].min for name in axes):
            break
    return sizes


def walk(session: StepSession, chain: Inputs) -> Iterator[tuple[Inputs, Tensor]]:
    """Step through `chain`, inputs as for `denoiser_loop`: inputs of each step and x after it."""
    x, steps = chain["noise0"], len(chain["schedule"])
    token = torch.arange(len(x), dtype=torch.int32)
    shared = {name: chain[name] for name in ("conditions", "guidance", "schedule")}
    for step in reversed(range(steps)):
        inputs = {"x": x, "step": torch.full_like(token, step), "token": token, **shared}
        out = call(session(step), inputs)
        noise = chain["temperature"][:, None] * out["log_std"].exp() * chain["noise"][step]
        x = out["mean"] + noise if step else out["mean"]
        yield inputs, x
