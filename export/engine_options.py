"""The options of engines on the command line, and which flavour of TensorRT takes which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from cspd.engines.backends import ENGINES
from cspd.engines.console.commands import Choice, option
from cspd.engines.console.idle_options import refuse_idle
from cspd.engines.trt.options import BuildOptions

Command = TypeVar("Command", bound=Callable[..., Any])
GROUP = "Engines"
# What both flavours take, and what only one of them does.
BOTH = ("workspace", "opt_level")
ONLY = {
    "tensorrt-rtx": ("compute_capability",),
    "tensorrt": ("timing_cache", "version_compatible", "hardware_compatible"),
}
ADD_BACKEND = "used for engines only; add --backend {} to build some"
OPTIONS = (
    option(
        "--backend", "backends", multiple=True, type=Choice(ENGINES), group=GROUP,
        help="Also build engines; may be repeated.", show_default="ONNX graphs only",
    ),
    option(
        "--compute-capability", multiple=True, metavar="X.Y", group=GROUP,
        show_default="8.6, 8.9, 12.0",
        help="tensorrt-rtx: GPUs that the engines are for; may be repeated.",
    ),
    option(
        "--workspace", type=click.IntRange(min=1), metavar="MIB", group=GROUP,
        show_default="no limit", help="Limit of scratch memory of a layer.",
    ),
    option(
        "--opt-level", default=3, type=click.IntRange(0, 5), group=GROUP,
        help="Effort of the engine builder.",
    ),
    option(
        "--timing-cache", type=click.Path(path_type=Path), group=GROUP, show_default="none",
        help="tensorrt: file with timings of earlier builds.",
    ),
    option(
        "--version-compatible", is_flag=True, group=GROUP,
        help="tensorrt: engines for newer versions too.",
    ),
    option(
        "--hardware-compatible", is_flag=True, group=GROUP,
        help="tensorrt: engines for Ampere and later.",
    ),
    option(
        "--hoisted/--no-hoisted", default=True, group=GROUP,
        help="Graphs that take the head's modulations from a table.",
    ),
)  # fmt: skip


def with_engine_options(command: Command) -> Command:
    """`command` with the options that decide which engines are built."""
    for each in reversed(OPTIONS):
        command = each(command)
    return command


def engine_options(
    backends: tuple[str, ...], values: Mapping[str, Any]
) -> tuple[BuildOptions, ...]:
    """One set of options per flavour among `backends`; UsageError for options that none takes."""
    if not backends:
        refuse_idle([*BOTH, "hoisted"], ADD_BACKEND.format("tensorrt-rtx"))
    for flavour, names in ONLY.items():
        if flavour not in backends:
            refuse_idle(names, ADD_BACKEND.format(flavour))
    return tuple(_options(flavour, values) for flavour in dict.fromkeys(backends))


def _options(flavour: str, values: Mapping[str, Any]) -> BuildOptions:
    taken = {name: values[name] for name in (*BOTH, *ONLY[flavour])}
    workspace = taken.pop("workspace")
    return BuildOptions(
        flavour=flavour,
        workspace_bytes=workspace << 20 if workspace else None,
        optimization_level=taken.pop("opt_level"),
        compute_capabilities=taken.pop("compute_capability", ()),
        **taken,
    )
