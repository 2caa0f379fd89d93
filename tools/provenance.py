"""Where a figure comes from: the command that made it and the commit of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import click
from click.core import ParameterSource

from cspd.engines.words import shell


def command_line() -> str:
    """The running command as it was typed, without options left at their defaults."""
    context = click.get_current_context()
    words = context.command_path.split()
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for item in value if isinstance(value, tuple) else (value,):
            words += _words(parameter, item)
    return shell(*words)


def _words(parameter: click.Parameter, value: object) -> list[str]:
    if isinstance(parameter, click.Argument):
        return [str(value)]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return [parameter.opts[0]]
    return [parameter.opts[0], str(value)]


def commit() -> str | None:
    """Commit of the source tree this runs from, with "+" if it was changed; None if installed."""
    folder = Path(__file__).parent
    try:
        found = [
            subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] + ("+" if found[1] else "")
