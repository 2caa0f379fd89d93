"""The speculative round with the modulations looked up, as `denoiser_hoisted` does for a step."""

from __future__ import annotations

from torch import Tensor, nn

from cspd.engines.spec import GraphSpec, TensorSpec
from cspd.export.graphs.denoiser_loop import modulation_width
from cspd.export.graphs.modulation import denoise_hoisted, table_axes
from cspd.export.graphs.round import Chain
from cspd.export.graphs.speculative_round import Start, on_rows, play_round, round_spec
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig


class HoistedRoundGraph(nn.Module):
    """`SpeculativeRoundGraph` on a table of modulations; see `hoisted_round_spec`."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss

    def forward(
        self, x: Tensor, step: Tensor, x0: Tensor, fraction: Tensor,
        modulation: Tensor, origin: Tensor, guidance: Tensor, temperature: Tensor,
        noise: Tensor, log_accept: Tensor, candidates: Tensor, choices: Tensor,
        schedule: Tensor, draft_state: Tensor, draft_noise: Tensor,
        row: Tensor, row_token: Tensor, slot: Tensor, length: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The outputs of `round_spec`, in its order."""

        def look(states: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
            token, weight = (v.index_select(0, row_token) for v in (origin, guidance))
            head = self.diffloss.net
            return denoise_hoisted(head, states, steps, token, modulation, weight, schedule)

        chain = Chain(temperature, noise, log_accept, schedule, draft_state, draft_noise)
        start = Start(x, step, x0, fraction)
        return play_round(start, length, chain, candidates, choices, on_rows(look, row, slot))


def hoisted_round_spec(config: MarConfig, max_rows: int) -> GraphSpec:
    """Contract of `speculative_round_hoisted`: `round_spec` with two inputs for the conditions.

    `modulation` is the table of `head_modulation`, `origin` [N] the row of each token in it: tokens
    that are finished leave the call, and the table stays as it is.
    """
    plain = round_spec(config, max_rows)
    table = ("modulated", "steps", "branches", modulation_width(config))
    condition = (
        TensorSpec(name="modulation", shape=table),
        TensorSpec(name="origin", dtype="int32", shape=("tokens",), below="modulated"),
    )
    where = [tensor.name for tensor in plain.inputs].index("conditions")
    return plain.model_copy(
        update={
            "name": "speculative_round_hoisted",
            "inputs": (*plain.inputs[:where], *condition, *plain.inputs[where + 1 :]),
            "axes": {**plain.axes, **table_axes(config, max_rows, "modulated")},
        }
    )
