"""What is told about a setting beside its type and bounds: help, and when it does anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cspd.engines.commands import METHOD
from cspd.engines.words import setting

if TYPE_CHECKING:
    from cspd.runtime.config import RunConfig


@dataclass(frozen=True)
class Need:
    """Settings that use another one: `fulfilled` tells them; `name` with `value` is one of them."""

    name: str
    value: Any
    fulfilled: Callable[[RunConfig], bool]


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


def idle(name: str, about: About, config: RunConfig) -> str | None:
    """Why setting `name` of `config` does nothing, and the fix; None if it does something."""
    need = next((need for need in about.needs if not need.fulfilled(config)), None)
    if need is None:
        return None
    cause = need.name if getattr(config, need.name) is not None else "method"
    return (
        f"{setting(name, getattr(config, name))} changes nothing with "
        f"{setting(cause, getattr(config, cause))}: leave it out, or add "
        f"{setting(need.name, need.value)}"
    )
