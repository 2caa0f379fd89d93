"""The settings of a run from what was asked for: one merge for all entries."""

from __future__ import annotations

import importlib.resources
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cspd.engines.bundle import MANIFEST, Bundle
from cspd.engines.errors import BundleError, SettingError
from cspd.engines.words import setting
from cspd.runtime.config import RunConfig, asked_config, make_config, parse_labels

USUAL_BATCH = 8


def shipped_bundle() -> Path:
    """The trained pair inside the package."""
    return Path(str(importlib.resources.files("cspd.demo_pair") / "bundle"))


def configure(
    bundle: Bundle, labels: str | Iterable[int | str] | None, sampling: Mapping[str, Any]
) -> RunConfig:
    """The configuration from settings, the bundle's defaults, and RunConfig's own, in this order.

    `labels` are classes, numbers or names, or text such as "207,360" or "sneaker,bag"; None means
    every class. A setting in `sampling` that is None was not given.
    """
    manifest = bundle.manifest
    _check_defaults(bundle)
    chosen = {name: value for name, value in sampling.items() if value is not None}
    chosen["labels"] = _classes(labels, bundle)
    usual = {
        "num_images": len(chosen["labels"]),
        "method": "cspd" if "draft" in manifest.models else "target",
        **manifest.defaults,
    }
    config = asked_config(chosen, usual)
    if "batch_size" in {**usual, **chosen}:
        return config
    return config.model_copy(update={"batch_size": even_batch(config.num_images)})


def _check_defaults(bundle: Bundle) -> None:
    """Raise BundleError for a default of the bundle that is wrong: nobody typed that option."""
    try:
        make_config(**{"labels": (0,), "num_images": 1, **bundle.manifest.defaults})
    except SettingError as error:
        raise BundleError(
            f"{bundle.folder / MANIFEST}: defaults: {error}; rebuild the bundle with this version "
            "of cspd-export"
        ) from None


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
