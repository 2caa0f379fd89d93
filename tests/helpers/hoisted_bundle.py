"""A bundle of the tiny target with real engines, as fast to build as can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiny_pair import tiny_plan

from cspd.engines.trt.options import BuildOptions
from cspd.export.build import build_bundle


def build_hoisted(out: Path) -> Path:
    """Build the target of `tiny_plan` in fp16, with tensorrt-rtx engines of every graph."""
    plan, engines = tiny_plan(), (BuildOptions(optimization_level=0),)
    options = replace(plan.options, precision="fp16", engines=engines)
    models = {"target": plan.models["target"]}
    return build_bundle(replace(plan, models=models, options=options), out)
