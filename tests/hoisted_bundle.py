"""A bundle of the tiny target with real engines, as fast to build as can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_pair import tiny_plan

from cspd.engines.manifest import Precision
from cspd.engines.trt_options import BuildOptions
from cspd.export.build import build_bundle


def build_hoisted(out: Path, precision: Precision = "fp32") -> Path:
    """Build the target of `tiny_plan` at `out`, with tensorrt-rtx engines of every graph."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    plan, engines = tiny_plan(), (BuildOptions(optimization_level=0),)
    options = replace(plan.options, precision=precision, engines=engines)
    models = {"target": plan.models["target"]}
    return build_bundle(replace(plan, models=models, options=options), out)
