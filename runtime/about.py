"""What is told about a setting beside its type and bounds: help, and when it does anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cspd.engines.console.commands import METHOD
from cspd.engines.words import setting


@dataclass(frozen=True)
class Need:
    """What a RunConfig must be like, which `fulfilled` tells; `name` with `value` makes it so."""

    name: str
    value: Any
    fulfilled: Callable[[Any], bool]


OF_CSPD = (Need("method", "cspd", lambda config: config.method == "cspd"),)
OF_RESIDUAL = (*OF_CSPD, Need("on_reject", "residual", lambda c: c.on_reject == "residual"))
SPECULATIVE = (Need("head", "lossless", lambda config: config.head_mode != "plain"),)
GUIDED = (Need("cfg", 3.0, lambda config: config.cfg != 1),)


@dataclass(frozen=True)
class About:
    """Help of a setting, its heading there, what it needs to do anything, and its default in words.

    `choices` are its values where the type does not tell them.
    """

    help: str
    group: str = METHOD
    needs: tuple[Need, ...] = ()
    default: str | None = None
    choices: tuple[str, ...] = ()


def idle(name: str, about: About, config: Any) -> str | None:
    """Why setting `name` of a RunConfig does nothing, and the fix; None if it does something."""
    need = next((need for need in about.needs if not need.fulfilled(config)), None)
    if need is None:
        return None
    cause = need.name if getattr(config, need.name) is not None else "method"
    return (
        f"{setting(name, getattr(config, name))} changes nothing with "
        f"{setting(cause, getattr(config, cause))}: leave it out, or add "
        f"{setting(need.name, need.value)}"
    )
