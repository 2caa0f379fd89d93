"""An option that would do nothing is refused, with what gives it a use."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.core import ParameterSource


def typed(names: Iterable[str]) -> list[str]:
    """Those options of the running command among `names` that were typed, as they are typed."""
    context, wanted = click.get_current_context(), set(names)
    return [
        _as_typed(param, context.params[param.name])
        for param in context.command.params
        if param.name in wanted
        and context.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    ]


def refuse_idle(names: Iterable[str], why: str) -> None:
    """Raise UsageError if an option of `names` was typed; `why` completes "--x, --y: "."""
    if found := typed(names):
        raise click.UsageError(f"{', '.join(found)}: {why}", click.get_current_context())


def other_options(*kept: str) -> list[str]:
    """Names of all options and arguments of the running command but those `kept`."""
    params = click.get_current_context().command.params
    return [str(param.name) for param in params if param.name not in kept]


def _as_typed(param: click.Parameter, value: object) -> str:
    if isinstance(param, click.Argument):
        return param.make_metavar(click.get_current_context())
    off = param.secondary_opts if value is False else []
    return (off or param.opts)[0]
