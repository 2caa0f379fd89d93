"""What both command lines share: how an error of the user's looks."""

from __future__ import annotations

from typing import Any

import click

from cspd.engines.errors import CspdError


class Commands(click.Group):
    """A group of commands where a CspdError becomes one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except CspdError as error:
            raise click.ClickException(str(error)) from None
