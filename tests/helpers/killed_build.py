"""A build with engines in a process of its own, which a test may kill."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from tiny_pair import tiny_plan

from cspd.engines.trt.options import BuildOptions as EngineOptions
from cspd.export.build import BundlePlan, build_bundle


def engine_plan() -> BundlePlan:
    """The tiny pair with an engine of every graph."""
    plan = tiny_plan()
    # Level 0 builds quickest.
    engines = (EngineOptions(optimization_level=0),)
    return replace(plan, options=replace(plan.options, engines=engines, hoisted=False))


def build_with_engines(out: Path, log: Path) -> None:
    """Build the bundle of `engine_plan` at `out`; `log` gets the lines of the report."""
    torch.set_num_threads(1)
    with log.open("a") as file:
        build_bundle(engine_plan(), out, report=lambda line: print(line, file=file, flush=True))


def start_build(out: Path, log: Path) -> ForkServerProcess:
    """`build_with_engines` in a new process, forked from one that has the libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_build", "tensorrt_rtx"])
    process = context.Process(target=build_with_engines, args=(out, log))
    process.start()
    return process
