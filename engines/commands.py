"""What both command lines share: how an error of the user's looks, and a size."""

from __future__ import annotations

import importlib
from typing import Any

import click

from cspd.engines import streams
from cspd.engines.cpus import limit_torch_threads
from cspd.engines.errors import MAX_LINE, CspdError, printable


def human_bytes(size: float) -> str:
    """A size with its unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


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
    """A group of commands where a CspdError becomes one line on stderr and its exit code."""

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
