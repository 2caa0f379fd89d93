"""How long a run should take on a CPU: its arithmetic, at rates that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import exp, log
from typing import Any

from cspd.engines.bundle import Bundle
from cspd.engines.cpus import available_cpus
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.plan import MaskPlan
from cspd.runtime.heads.steps import HeadSteps

# Operations per second of one core against operations per image, of two runs of `target`: the
# shipped pair in batches of 8 on two cores (docs/evidence/bench.md), and mar-h in float32, one
# image on one core (docs/evidence/engines.md). Small matrices take longer per operation.
MEASURED = ((4.2e10, 6.0e10), (1.61e13, 1.18e11))
# What the manifest says of a model, as somebody wrote it, and the most that is believed.
SIZES = ("embed_dim", "encoder_depth", "decoder_depth", "head_width", "head_depth",
         "token_dim", "buffer_size")  # fmt: skip
MAX_SIZE = 1 << 16
TIME_FEATURES = 256  # of the sinusoidal embedding of a denoising step


def image_seconds(bundle: Bundle, config: RunConfig, device: str, threads: int) -> float | None:
    """Seconds per image of stepping alone; None on a GPU, where nothing was measured.

    None, too, where the bundle does not tell the sizes of its model.

    `cspd` is taken for `target`: what is accepted is not known beforehand. Cores are taken to be
    those of the measured runs, which is right within a factor of about two.
    """
    sizes = bundle.manifest.models["draft" if config.method == "draft" else "target"].config
    told = (type(size := sizes.get(name)) is int and 1 <= size <= MAX_SIZE for name in SIZES)
    if device != "cpu" or not all(told):
        return None
    work = operations(sizes, bundle.manifest.geometry.num_tokens, config)
    return work / rate(work) / (threads or available_cpus())


def rate(work: float) -> float:
    """Operations per second of a core in a run of `work` operations per image."""
    (little, slow), (much, fast) = MEASURED
    share = min(1.0, max(0.0, log(work / little) / log(much / little)))
    return exp((1 - share) * log(slow) + share * log(fast))


def operations(model: Mapping[str, Any], tokens: int, config: RunConfig) -> float:
    """Multiplications and additions of an image of `tokens`, by the MAR model of sizes `model`."""
    width = model["embed_dim"]
    boundaries = MaskPlan(tokens, config.num_iter).boundaries
    steps, total = HeadSteps.parse(config.head_steps), 0.0
    for index, (known, after) in enumerate(pairwise((0, *boundaries))):
        visible, whole = (model["buffer_size"] + count for count in (known, tokens))
        total += model["encoder_depth"] * _block(width, visible)
        total += model["decoder_depth"] * _block(width, whole)
        total += _head(model) * (after - known) * steps.at(index, config.num_iter)
    return total * (1 if config.cfg == 1 else 2)


def _block(width: int, length: int) -> float:
    """A transformer block on `length` tokens: projections, the MLP and attention."""
    return 24.0 * width**2 * length + 4.0 * width * length**2


def _head(model: Mapping[str, Any]) -> float:
    """One denoising step of one token."""
    width = model["head_width"]
    inputs = model["embed_dim"] + TIME_FEATURES + 3 * model["token_dim"]
    return 2.0 * (width**2 * (5 * model["head_depth"] + 3) + width * inputs)
