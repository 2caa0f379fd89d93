"""Which graphs one member of the pair is exported as, by precision."""

from __future__ import annotations

from torch import nn

from cspd.engines.spec import GraphSpec
from cspd.export.graphs.denoiser import (
    TOLERANCES,
    DenoiserGraph,
    backbone_spec,
    denoiser_spec,
)
from cspd.export.graphs.denoiser_loop import DenoiserLoopGraph, denoiser_loop_spec
from cspd.export.graphs.hoisted_round import HoistedRoundGraph, hoisted_round_spec
from cspd.export.graphs.modulation import (
    HeadModulationGraph,
    HoistedDenoiserGraph,
    hoisted_spec,
    modulation_spec,
)
from cspd.export.graphs.speculative_loop import SpeculativeLoopGraph, speculative_loop_spec
from cspd.export.graphs.speculative_round import SpeculativeRoundGraph, round_spec
from cspd.export.mar.model import DiffusionLoss, Mar

FIRST, ROUND = "denoiser_first", "speculative_round"
MODULATION, HOISTED, HOISTED_ROUND = (
    "head_modulation", "denoiser_hoisted", "speculative_round_hoisted",
)  # fmt: skip
# Graphs of the head that compute in float32 whatever the precision of the model.
EXACT = (FIRST, ROUND, MODULATION, HOISTED_ROUND)


def with_tolerance(spec: GraphSpec, precision: str) -> GraphSpec:
    """`spec` with the tolerance of `precision` on every float output."""
    tolerance = TOLERANCES[precision]
    outputs = tuple(
        tensor.model_copy(update={"tolerance": tolerance}) if tensor.dtype == "float32" else tensor
        for tensor in spec.outputs
    )
    return spec.model_copy(update={"outputs": outputs})


def without_first_step(spec: GraphSpec) -> GraphSpec:
    """The contract of a denoiser that is never asked for the first step of a chain."""
    inputs = tuple(
        tensor.model_copy(update={"spares_last": True}) if tensor.name == "step" else tensor
        for tensor in spec.inputs
    )
    return spec.model_copy(update={"inputs": inputs})


def model_graphs(
    model: Mar,
    max_batch: int,
    max_rows: int,
    precision: str = "fp32",
    exact: DiffusionLoss | None = None,
    *,
    hoisted: bool = False,
) -> dict[str, tuple[nn.Module, GraphSpec]]:
    """Every graph of one pair member by name, with its contract.

    A model in reduced `precision` takes its first denoising step from `exact`, its head in float32,
    because that step multiplies rounding errors by some hundreds. It has no loops, which could not
    do so; speculative rounds, which mix steps, are in float32 altogether. `hoisted` adds the graphs
    that take the place of the loops in engines: modulations ahead of the steps, and steps on them.
    """
    head, config = model.diffloss, model.config
    backbone, denoiser = backbone_spec(config, max_batch), denoiser_spec(config, max_rows)
    graphs: dict[str, tuple[nn.Module, GraphSpec]] = {
        "backbone": (model, with_tolerance(backbone, precision)),
        "denoiser": (DenoiserGraph(head), with_tolerance(denoiser, precision)),
    }
    if precision == "fp32":
        exact = head
        graphs["denoiser_loop"] = DenoiserLoopGraph(head), denoiser_loop_spec(config, max_rows)
        loop = speculative_loop_spec(config, max_rows)
        graphs["speculative_loop"] = SpeculativeLoopGraph(head), loop
    else:
        assert exact is not None
        graphs["denoiser"] = graphs["denoiser"][0], without_first_step(graphs["denoiser"][1])
        graphs[FIRST] = DenoiserGraph(exact), denoiser.model_copy(update={"name": FIRST})
    graphs[ROUND] = SpeculativeRoundGraph(exact), round_spec(config, max_rows)
    return graphs | _hoisted_graphs(model, exact, max_rows, precision) if hoisted else graphs


def _hoisted_graphs(
    model: Mar, exact: DiffusionLoss, max_rows: int, precision: str
) -> dict[str, tuple[nn.Module, GraphSpec]]:
    """The modulations of `exact`, a step of the model on them, and a round of `exact`."""
    config = model.config
    step = with_tolerance(hoisted_spec(config, max_rows), precision)
    return {
        MODULATION: (HeadModulationGraph(exact), modulation_spec(config, max_rows)),
        HOISTED: (
            HoistedDenoiserGraph(model.diffloss),
            step if precision == "fp32" else without_first_step(step),
        ),
        HOISTED_ROUND: (HoistedRoundGraph(exact), hoisted_round_spec(config, max_rows)),
    }
