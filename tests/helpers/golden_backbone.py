"""Cases of the authors' vectors of the transformer, and a schedule that shows a head's output."""

import torch
from recorded import vectors

from cspd.engines.schedule import COLUMNS

VECTORS = vectors()


def visible_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions of the visible tokens [B, V] of a mask [B, L] with equally many per row."""
    visible = [row.eq(0).nonzero()[:, 0] for row in mask]
    return torch.stack(visible).int()


def golden_case(count: int):
    names = (f"backbone.{count}.{part}" for part in ("tokens", "mask", "z"))
    tokens, mask, z = (VECTORS[name] for name in names)
    return tokens, visible_of(mask), z


def transparent_schedule(times: torch.Tensor) -> torch.Tensor:
    """A schedule whose kernel is the network's output: mean = guided noise, log_std = fraction."""
    columns = {name: torch.zeros(len(times)) for name in COLUMNS}
    columns["timestep"] = times.float()
    columns["x0_from_noise"] = torch.full((len(times),), -1.0)
    columns["mean_x0"] = columns["log_std_max"] = torch.ones(len(times))
    return torch.stack([columns[name] for name in COLUMNS], dim=1)
