"""The settings of a run from what was asked for: one merge for all entries."""

from __future__ import annotations

import importlib.resources
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cspd.engines.bundle import MANIFEST, Bundle, open_bundle
from cspd.engines.errors import BundleError, SettingError
from cspd.engines.manifest import Manifest
from cspd.engines.words import setting, speaking
from cspd.runtime.config import RunConfig, asked_config, parse_labels
from cspd.runtime.costs.sizes import DEFAULT_WINDOW
from cspd.runtime.defaults import check_defaults

USUAL_BATCH = 8


def shipped_bundle() -> Path:
    """The trained pair inside the package."""
    return Path(str(importlib.resources.files("cspd.demo_pair") / "bundle"))


def usable_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, its defaults checked: what every entry begins with.

    Files are checked when they are used. BundleError names the manifest, and the default that this
    bundle cannot run.
    """
    bundle = open_bundle(folder)
    try:
        with speaking("python"):  # the keys of the manifest
            check_defaults(bundle.manifest, _usual(bundle.manifest))
    except SettingError as error:
        raise BundleError(
            f"{folder / MANIFEST}: defaults: {error}; rebuild the bundle with cspd-export build"
        ) from None
    return bundle


def configure(
    bundle: Bundle, labels: str | Iterable[int | str] | None, sampling: Mapping[str, Any]
) -> RunConfig:
    """The configuration from settings, the bundle's defaults, and RunConfig's own, in this order.

    `labels` are classes, numbers or names, or text such as "207,360" or "sneaker,bag"; None means
    every class. A setting in `sampling` that is None was not given.
    """
    chosen = {name: value for name, value in sampling.items() if value is not None}
    chosen["labels"] = _classes(labels, bundle)
    usual = {"num_images": len(chosen["labels"]), **_usual(bundle.manifest)}
    config = asked_config(chosen, usual)
    if "batch_size" in {**usual, **chosen}:
        return config
    return config.model_copy(update={"batch_size": even_batch(config.num_images)})


def without_measuring(config: RunConfig, bundle: Bundle) -> RunConfig:
    """`config` with the usual window where measured costs would choose one.

    For answers to requests, which may neither wait for a measurement nor depend on a machine.
    """
    if config.head_mode != "auto":
        return config
    most = bundle.graph("target/speculative_round").spec.axes["window"].max
    named = {name: "lossless" for name in ("method", "head") if getattr(config, name) == "auto"}
    window = config.window or min(DEFAULT_WINDOW, most)
    return config.model_copy(update={**named, "window": window})


def _usual(manifest: Manifest) -> dict[str, Any]:
    """The settings of a run that asks for nothing, but for its images."""
    tokens = manifest.geometry.num_tokens
    # Usual numbers that no small image has.
    fits = {
        name: min(RunConfig.model_fields[name].default, tokens) for name in ("num_iter", "gamma")
    }
    method = "cspd" if "draft" in manifest.models else "target"
    return {"method": method, **fits, **manifest.defaults}


def even_batch(num_images: int) -> int:
    """Images per batch that leave the fewest to pad: a batch that is not full costs a full one."""
    return -(-num_images // -(-num_images // USUAL_BATCH))


def _classes(labels: str | Iterable[int | str] | None, bundle: Bundle) -> tuple[int, ...]:
    """Class numbers; whether the bundle has them is checked with the rest, by `check_config`."""
    names = bundle.manifest.class_names
    if labels is None:
        return tuple(range(bundle.manifest.geometry.num_classes))
    found: list[int] = []
    for label in [labels] if isinstance(labels, str) else labels:
        if isinstance(label, str):
            found += parse_labels(label, names)
        elif isinstance(label, bool) or not isinstance(label, numbers.Integral):
            raise SettingError(
                f"{setting('labels')}: {label!r:.60} is neither the number nor the name of a class"
            )
        else:
            found.append(int(label))
    return tuple(found)
