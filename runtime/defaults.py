"""Whether a bundle can run its own defaults, in words that name the key of the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cspd.engines.backends import ENGINES
from cspd.engines.console.commands import WHAT
from cspd.engines.errors import SettingError
from cspd.engines.manifest import Manifest
from cspd.engines.words import setting
from cspd.runtime.bounds import expected
from cspd.runtime.config import RunConfig, about, check_settings, valid_config

ROUND = "target/speculative_round"


def check_defaults(manifest: Manifest, usual: Mapping[str, Any]) -> None:
    """Raise SettingError for the first default of `manifest` that no run of it could have.

    `usual` are the defaults with what a run takes where they say nothing.
    """
    for name, value in manifest.defaults.items():
        _check_one(name, value)
    classes = tuple(range(manifest.geometry.num_classes))
    # A bundle answers for what it says, not for what is taken where it says nothing.
    silent = {"head_steps": 2, "num_images": len(classes)}
    values = {**silent, **usual, "labels": classes}
    config = valid_config(values, strict=True)
    check_settings(config, manifest)
    _check_rounds(config, manifest)
    _check_engines(config, manifest)


def _check_engines(config: RunConfig, manifest: Manifest) -> None:
    """Raise SettingError for a backend of engines that the bundle does not have."""
    built = {flavour for graph in manifest.graphs().values() for flavour in graph.engines}
    if config.backend in ENGINES and config.backend not in built:
        raise SettingError(f"{setting('backend', config.backend)}: the bundle has no such engines")


def _check_one(name: str, value: object) -> None:
    """Raise SettingError for what is no default, whatever the others are."""
    if name not in RunConfig.model_fields:
        return  # `valid_config` suggests the name that was meant
    told = about(name)
    if told is None or told.group == WHAT:
        raise SettingError(f"{setting(name)} is chosen by each run, it has no default")
    if value is None:
        raise SettingError(f"{setting(name)} is null, expected {expected(RunConfig, name, value)}")
    if told.choices and value not in told.choices:
        raise SettingError(
            f"{setting(name)} is {value!r:.60}, expected one of {', '.join(told.choices)}"
        )


def _check_rounds(config: RunConfig, manifest: Manifest) -> None:
    """Raise SettingError if the heads cannot speculate as the defaults say."""
    graph = manifest.graphs().get(ROUND)
    if graph is None:
        if config.head_mode != "plain":
            name = "head" if config.head else "method"
            raise SettingError(
                f"{setting(name, getattr(config, name))}: the bundle has no graph {ROUND}"
            )
        return
    axis = graph.spec.axes.get("window")
    if config.window is not None and axis is not None and config.window > axis.max:
        raise SettingError(f"{setting('window')} is {config.window}, expected 1..{axis.max}")
