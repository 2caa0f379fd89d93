"""A second family of models, unlike MAR in everything that the loops could take for granted.

Tokens come in raster order from a causal transformer of one layer with a cache of keys and values;
a head predicts flow velocities, without variances; there are no classes and no guidance. All of it
is exported to ONNX with the exporter's own tools, and the runtime's loops run it as they are.
"""

from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import nn

from cspd.engines.schedule import FlowSpec, make_schedule
from cspd.engines.sessions.ort import ort_session
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.graphs.denoiser import DenoiserGraph, denoiser_spec
from cspd.export.graphs.speculative_round import SpeculativeRoundGraph, round_spec
from cspd.export.mar.head import DiffusionHead, FinalLayer
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig
from cspd.export.onnx.trace import export_graph
from cspd.runtime.decode.plan import RasterPlan
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.heads.plain import StepHead
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.noise import Noise

WIDTH, CHANNELS, LENGTH = 24, 4, 9
# The sizes that graphs of the head are made for; depths of a transformer mean nothing here.
CONFIG = MarConfig(3, WIDTH, 1, 1, 2, head_width=32, head_depth=2, token_dim=CHANNELS)
FLOW = FlowSpec(out="data - noise", embeds="1 - s", euler_at_last=True)
SCHEDULE = make_schedule(FLOW, 12)
MAX_ROWS = 64


class FlowHead(DiffusionHead):
    """A head whose output is a velocity alone: it has no channels of variance."""

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__(token_dim, condition_dim, width, depth)
        self.final_layer = FinalLayer(width, token_dim)

    def denoise(self, x, modulation):
        width = self.input_proj.out_features
        parts = modulation.split([3 * width] * len(self.res_blocks) + [2 * width], dim=-1)
        x = self.input_proj(x)
        for block, part in zip(self.res_blocks, parts, strict=False):
            x = block(x, part)
        velocity = self.final_layer(x, parts[-1])
        return velocity, torch.zeros_like(velocity)


def flow_head(config: MarConfig) -> DiffusionLoss:
    """The head of a model, where graphs look for it."""
    loss = DiffusionLoss(config)
    loss.net = FlowHead(config.token_dim, config.embed_dim, config.head_width, config.head_depth)
    return loss.eval()


class Extend(nn.Module):
    """One more token of a sequence: its keys and values, and the state after it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Linear(CHANNELS, WIDTH), nn.Embedding(LENGTH + 1, WIDTH)
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, token, place, past):
        x = self.token(token) + nn.functional.embedding(place, self.place.weight)
        own = self.key_value(x)[:, None]
        keys, values = torch.cat([past, own], dim=1).chunk(2, dim=-1)
        weights = (self.query(x)[:, None] @ keys.transpose(1, 2) / WIDTH**0.5).softmax(-1)
        return x + (weights @ values)[:, 0], own[:, 0]


class Ask(nn.Module):
    """Conditions of tokens at any places, given the state after the known ones."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.out = nn.Embedding(LENGTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, state, positions):
        return self.out(state[:, None] + nn.functional.embedding(positions, self.place.weight))


def extend_spec() -> GraphSpec:
    rows = Axis(min=1, opt=2, max=MAX_ROWS)
    return GraphSpec(
        name="extend",
        inputs=(
            TensorSpec(name="token", shape=("rows", CHANNELS)),
            TensorSpec(name="place", dtype="int32", shape=("rows",), below=LENGTH + 1),
            TensorSpec(name="past", shape=("rows", "known", 2 * WIDTH)),
        ),
        outputs=(
            TensorSpec(name="state", shape=("rows", WIDTH), tolerance=1e-4),
            TensorSpec(name="key_value", shape=("rows", 2 * WIDTH), tolerance=1e-4),
        ),
        axes={"rows": rows, "known": Axis(min=0, opt=4, max=LENGTH)},
    )


def ask_spec() -> GraphSpec:
    return GraphSpec(
        name="ask",
        inputs=(
            TensorSpec(name="state", shape=("rows", WIDTH)),
            TensorSpec(name="positions", dtype="int32", shape=("rows", "asked"), below=LENGTH),
        ),
        outputs=(TensorSpec(name="z", shape=("rows", "asked", WIDTH), tolerance=1e-4),),
        axes={
            "rows": Axis(min=1, opt=2, max=MAX_ROWS), "asked": Axis(min=1, opt=2, max=LENGTH),
        },
    )  # fmt: skip


@dataclass
class ToyModel:
    """Draft or target of the family: a `Model` that keeps keys and values from call to call.

    They are kept by the tokens that they follow from, so that a rejection needs no rewinding.
    """

    name: str
    extend: object
    ask: object
    head: object
    kept: dict = field(default_factory=dict)
    evaluated: int = 0

    def conditions(self, canvas, batch, span, *, guided, visible, width):
        assert not guided
        states = [self._state(canvas, row, known) for row, known in enumerate(visible)]
        return self.ask(state=torch.cat(states), positions=span.positions)["z"][None].clone()

    def _state(self, canvas, row, known):
        """The state [1, W] after the start and `known` tokens of a row, a call for each new one."""
        order = canvas.sequence[row, :known].long()
        tokens = torch.cat([torch.zeros(1, CHANNELS), canvas.tokens[row, order]])
        past, state = torch.empty(1, 0, 2 * WIDTH), None
        for place in range(known + 1):
            key = tokens[: place + 1].numpy().tobytes()
            if key not in self.kept:
                self.evaluated += 1
                out = self.extend(
                    token=tokens[place][None], place=torch.tensor([place], dtype=torch.int32),
                    past=past,
                )  # fmt: skip
                self.kept[key] = out["state"].clone(), out["key_value"].clone()
            state, own = self.kept[key]
            past = torch.cat([past, own[:, None]], dim=1)
        return state


@dataclass(frozen=True)
class ToyGraphs:
    """The exported graphs of one model, open."""

    extend: object
    ask: object
    denoiser: object
    speculative_round: object

    def model(self, name: str, window: int | None = None) -> ToyModel:
        """The model under a role, its head stepping or, with a `window`, speculating."""
        head = StepHead(self.denoiser)
        if window is not None:
            options = SpeculationOptions(window)
            head = SpeculativeHead(self.speculative_round, options, CHANNELS)
        return ToyModel(name, self.extend, self.ask, head)


def toy_modules(seed: int) -> dict[str, tuple[nn.Module, GraphSpec]]:
    """The networks of a model with random weights, and their contracts."""
    torch.manual_seed(seed)
    head = flow_head(CONFIG)
    with torch.no_grad():
        head.net.final_layer.linear.weight.mul_(0.3)
    return {
        "extend": (Extend().eval(), extend_spec()),
        "ask": (Ask().eval(), ask_spec()),
        "denoiser": (DenoiserGraph(head), denoiser_spec(CONFIG, MAX_ROWS)),
        "speculative_round": (SpeculativeRoundGraph(head), round_spec(CONFIG, MAX_ROWS)),
    }


def export_toy(seed: int, folder, *, rounds: bool = True) -> ToyGraphs:
    """Export a model to ONNX files in `folder`, and open them; without `rounds` it only steps."""
    sessions: dict[str, object] = {"speculative_round": None}
    for name, (module, spec) in toy_modules(seed).items():
        if name == "speculative_round" and not rounds:
            continue
        path = folder / f"{seed}-{name}.onnx"
        ir.save(export_graph(module, spec), path)
        sessions[name] = ort_session(str(path), spec, threads=1)
    return ToyGraphs(**sessions)


def toy_sampler(seed: int = 0, width: int = 1) -> Sampler:
    return Sampler(RasterPlan(LENGTH, width), SCHEDULE, Noise(seed))
