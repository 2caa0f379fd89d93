"""The options of the command line that decide which images are made: the fields of RunConfig."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from cspd.engines.backends import BACKENDS
from cspd.engines.bundle import open_bundle
from cspd.engines.console.commands import METHOD, SPEED, WHAT, Choice, Option, option
from cspd.engines.errors import CspdError
from cspd.runtime.bounds import expected
from cspd.runtime.config import RunConfig, about
from cspd.runtime.settings import shipped_bundle

Command = TypeVar("Command", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


class Setting(Option):
    """The option of a field of RunConfig. Not given, it is None: the bundle, then the field."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Default and bounds, as the field and the shipped bundle have them."""
        extra = super().get_help_extra(ctx)
        name = str(self.name)
        if not self.is_flag or self.secondary_opts:
            extra["default"] = _default(name)
        if self.type in (click.INT, click.FLOAT):
            extra["range"] = expected(RunConfig, name, 1)
        return extra


def _default(name: str) -> str:
    told, default = about(name), RunConfig.model_fields[name].default
    if name in _shipped_defaults():
        return f"the bundle's; shipped pair: {_shown(_shipped_defaults()[name])}"
    if told is not None and told.default is not None:
        return told.default
    return name.replace("_", "-") if default is True else _shown(default)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def _shipped_defaults() -> dict[str, Any]:
    return dict(open_bundle(shipped_bundle()).manifest.defaults)


def _whole(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """A number where the text is one."""
    return int(value) if value and value.isdecimal() else value


def setting_option(name: str) -> Callable[[Command], Command]:
    """The click option of field `name` of RunConfig."""
    field, told = RunConfig.model_fields[name], about(name)
    assert told is not None
    alone = get_origin(field.annotation) is Literal or not get_args(field.annotation)
    kinds = [field.annotation] if alone else list(get_args(field.annotation))
    kinds = [kind for kind in kinds if kind is not NoneType]
    flag = "--" + name.replace("_", "-")
    make = functools.partial(option, cls=Setting, group=told.group, default=None, help=told.help)
    if kinds == [bool]:
        return make(f"{flag}/--no-{flag[2:]}" if field.default else flag, is_flag=True)
    if choices := told.choices or get_args(kinds[0]):
        return make(flag, type=Choice(choices))
    return make(flag, callback=_whole) if len(kinds) > 1 else make(flag, type=kinds[0])


AS_RELEASED = option(
    "--as-released", is_flag=True, default=None, group=METHOD,
    help="cspd as the authors released it: test at 42, residual at 1, count in steps.",
)  # fmt: skip
SAMPLING = (*(setting_option(name) for name in RunConfig.model_fields if about(name)), AS_RELEASED)
MACHINE = (
    option("--device", default="cpu", type=Choice(["cpu", "cuda"]), group=SPEED,
           help="Where the networks run."),
    option("--threads", default=0, type=click.IntRange(0, 1024), show_default="all cores",
           group=SPEED, help="CPU threads."),
)  # fmt: skip
# Of verbs that do not take the settings of a run, which hold one too.
backend_option = option(
    "--backend", default="onnxruntime", type=Choice(tuple(BACKENDS)), group=SPEED,
    help="What runs the networks.",
)  # fmt: skip


def _class_names(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Labels that the shell may complete `text` to: the last of several is completed in each."""
    begun, comma, last = text.rpartition(",")
    # Behind an option that still lacks its value, click has not assigned arguments yet.
    named = next(iter(context.args), None) or context.params.get("bundle")
    try:
        names = open_bundle(Path(named or shipped_bundle())).manifest.class_names
    except CspdError:
        return []
    return [begun + comma + name for name in names if name.lower().startswith(last.lower())]


LABELS = option(
    "--labels", multiple=True, group=WHAT, show_default="all", shell_complete=_class_names,
    help='Classes, cycled: "207,360", "0-3" or "sneaker,bag"; given twice, both.',
)  # fmt: skip


def _all(options: tuple[Callable[[Command], Command], ...], command: Command) -> Command:
    for each in reversed(options):
        command = each(command)
    return command


def sampling_options(command: Command) -> Command:
    """Options that decide which images are made."""
    return _all(SAMPLING, command)


def machine_options(command: Command) -> Command:
    """Options that choose what runs the networks."""
    return _all(MACHINE, command)
