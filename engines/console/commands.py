"""What both command lines share: help in groups, endings, new folders, errors of the user's."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cspd.engines.console import streams
from cspd.engines.cpus import limit_torch_threads
from cspd.engines.errors import MAX_LINE, CspdError, printable
from cspd.engines.words import nearest

# Headings of the help: in the order of the first option of each, and the last of these last.
WHAT, METHOD, SPEED, OUTPUT, OTHER = "What to make", "Method", "Speed", "Output", "Options"


def human_bytes(size: float) -> str:
    """A size with its unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def human_seconds(seconds: float) -> str:
    """A duration, rounded, with its unit."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"


class Option(click.Option):
    """An option that stands in the help under `group`; a text in `show_default` is shown as is."""

    def __init__(self, *args: Any, group: str = OTHER, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What stands in brackets behind the help."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


option = functools.partial(click.option, cls=Option)
json_option = option(
    "--json", "as_json", is_flag=True, group=OUTPUT,
    help="Print JSON, which names the files that were made.",
)  # fmt: skip


class Choice(click.Choice[str]):
    """A choice whose refusal suggests the nearest value."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What is wrong with `value`."""
        message = super().get_invalid_choice_message(value, ctx)
        near = nearest(str(value), map(str, self.choices))
        return f"{message} Did you mean {near!r}?" if near else message


class Verb(click.Command):
    """A command whose help stands in groups, and ends with an example per line of `example`."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under the headings of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            line = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if line is not None:
                groups.setdefault(getattr(param, "group", OTHER), []).append(line)
        for heading in sorted(groups, key=lambda heading: heading == OTHER):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, each as it can be typed."""
        if self.example:
            with formatter.section("Example" if "\n" not in self.example else "Examples"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def new_out(verb: str, suffix: str = "", parent: Path = Path("out")) -> Path:
    """The next free one of out/VERB-001, out/VERB-002, ...: a new folder, a new file with `suffix`.

    It is made here, so that two commands at once never get the same. Raises CspdError where that
    is not possible.
    """
    pattern = re.compile(rf"{re.escape(verb)}-([0-9]{{3,9}})({re.escape(suffix)})?")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        found = (pattern.fullmatch(path.name) for path in parent.iterdir())
        number = max((int(match[1]) for match in found if match), default=0)
        while True:
            number += 1
            path = parent / f"{verb}-{number:03d}{suffix}"
            try:
                path.touch(exist_ok=False) if suffix else path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise CspdError(
            f"{parent}: cannot write there: {error.strerror}; choose another place with --out"
        ) from None


@contextlib.contextmanager
def out_folder(given: Path | None, verb: str) -> Iterator[Path]:
    """The folder to write: the `given` one, or the next of `new_out`, gone again if left empty."""
    folder = new_out(verb) if given is None else given
    try:
        yield folder
    finally:
        if given is None:
            with contextlib.suppress(OSError):
                folder.rmdir()


def finish(
    as_json: bool, record: Mapping[str, Any], made: Sequence[Path | str], *lines: str
) -> None:
    """End a verb on stdout: what it made and what to do next in `lines`, or `record` as JSON.

    The JSON has the files that were `made` under "made".
    """
    if as_json:
        names = [click.format_filename(path) for path in made]
        click.echo(json.dumps({**record, "made": names}, indent=1))
    else:
        for line in lines:
            click.echo(line)


class ToolCommand(click.Command):
    """A verb whose module is imported only when it is used: `command` in module `module`."""

    def __init__(self, name: str, module: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self._module = module

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """The context of the real command."""
        command: click.Command = importlib.import_module(self._module).command
        return command.make_context(*args, **kwargs)


class Commands(click.Group):
    """A group of commands where a CspdError becomes one line on stderr and its exit code.

    Their help shows every default; a verb that is nearly right is suggested.
    """

    command_class = Verb

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings.update(help_option_names=["-h", "--help"], show_default=True)

    def add_tool(self, name: str, module: str, summary: str) -> None:
        """Add a verb that a module above this one provides."""
        self.add_command(ToolCommand(name, module, summary))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line; output that got lost is one line, and an exit code that is not 0."""
        streams.guard()
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            lost = streams.failure()
            if lost is None:
                raise
            click.echo(
                f"Error: stdout: cannot be written to: {lost}; the command itself ran to its end, "
                "and files that it wrote are whole",
                err=True,
            )
            raise SystemExit(end.code or 1) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command, PyTorch within the granted CPUs."""
        limit_torch_threads()
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            # It repeats the value in full, however long that is.
            if len(error.message) <= MAX_LINE:
                raise
            raise click.UsageError(printable(error.message), error.ctx) from None
        except CspdError as error:
            click.ClickException(str(error)).show()
            ctx.exit(error.exit_code)
