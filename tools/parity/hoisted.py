"""Recorded inputs of the hoisted graphs, from those of the graphs that take conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from cspd.engines.sessions.session import Session
from cspd.tools.probe import call

Inputs = dict[str, Tensor]
FEW = 4  # tokens: the modulations of one take 47 MB in mar-h


def few_rows(step: Inputs) -> Inputs:
    """The first tokens of a denoising step that has one row for each."""
    shared = {"conditions": step["conditions"][:, :FEW], "schedule": step["schedule"]}
    rows = {name: step[name][:FEW] for name in ("x", "step", "token", "guidance")}
    return {**rows, **shared}


def on_table(modulate: Session, inputs: Inputs) -> Inputs:
    """Inputs of the hoisted twin of a graph: a table of modulations in place of conditions.

    The table of a round is in reverse order, and `origin` leads back.
    """
    rest = {name: tensor for name, tensor in inputs.items() if name != "conditions"}
    conditions, schedule = inputs["conditions"], inputs["schedule"]
    if "row_token" in inputs:
        count = conditions.shape[1]
        rest["origin"] = torch.arange(count - 1, -1, -1, dtype=torch.int32)
        conditions = conditions.flip(1)
    return {**rest, **call(modulate, {"conditions": conditions, "schedule": schedule})}
