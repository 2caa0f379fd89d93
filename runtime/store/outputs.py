"""What images and `run.json` say about themselves."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cspd.engines.bundle import Bundle
from cspd.engines.cpus import available_cpus
from cspd.engines.errors import CspdError
from cspd.runtime.config import RunConfig, make_config
from cspd.runtime.decode.stats import Tally, Verdicts, read_tally
from cspd.runtime.pipeline import GeneratedImage
from cspd.runtime.store.distribution import certificate, distribution

# 2: `target_calls` counts evaluations, `target_rounds` what it counted before; the target's tokens
# that were asked for are `replaced_by_target` and no `fallback`; lines with checksums and their
# hashes, settings.json, the grid in a folder of its own.
RUN_SCHEMA = 2
# 2: test and residual of `cspd` hold --temperature; speculative chains of --no-align share nothing.
IMAGE_SCHEMA = 2


def image_metadata(config: RunConfig, bundle: Bundle, image: GeneratedImage) -> dict[str, Any]:
    """What a PNG says about itself: enough to make it again.

    Of the labels of its run it has its own alone: all of them would be longer than the pixels.
    """
    own = config.model_copy(update={"labels": (image.label,)})
    return {
        "schema": IMAGE_SCHEMA,
        "image": image.index,
        "label": image.label,
        "class": bundle.manifest.class_names[image.label],
        "config": own.model_dump(mode="json"),
        "bundle": bundle.sha256,
        "tool": tool_version(),
        **({"synthetic": True} if bundle.manifest.synthetic else {}),
    }


def recorded_config(metadata: dict[str, Any], path: Path) -> RunConfig:
    """The settings inside the image `path`, in today's words where an older version wrote them.

    Raises CspdError if they are not valid, or if this version makes another image of them.
    """
    values = metadata.get("config")
    if metadata.get("schema") == 1 and isinstance(values, dict):
        # The residual had the temperature of the test.
        values = {"residual_temperature": values.get("accept_temperature"), **values}
    try:
        config = make_config(**values) if isinstance(values, dict) else None
    except CspdError as error:
        raise CspdError(f"{path}: its settings are not valid: {error}") from None
    if config is None:
        raise CspdError(f"{path}: its settings are not valid: expected an object of settings")
    if metadata.get("schema") == 1 and config.method == "cspd":
        reasons = {
            f"--temperature {config.temperature:g}": config.temperature != 1,
            "--no-align with speculative heads": not config.align and config.head_mode != "plain",
        }
        for reason in (name for name, holds in reasons.items() if holds):
            raise CspdError(
                f"{path}: was made by an older version, which sampled otherwise with {reason}; "
                "make it again with cspd-run generate and the settings inside it"
            )
    return config


def run_record(config: RunConfig, bundle: Bundle, tally: Tally) -> dict[str, Any]:
    """The contents of `run.json`: configuration, versions, hashes, statistics, time per graph.

    `tally` counts the images whose batch was noted: all of them, except for a batch that was
    finished in the very moment of a kill.
    """
    return {
        "schema": RUN_SCHEMA,
        "tool": tool_version(),
        "bundle": {"sha256": bundle.sha256, "synthetic": bundle.manifest.synthetic},
        "distribution": distribution(config, bundle.manifest),
        "certificate": certificate(config),
        "config": config.model_dump(mode="json"),
        "images": config.num_images,
        **figures(tally),
        "host": environment(),
    }


def figures(tally: Tally) -> dict[str, Any]:
    """What a tally says in `run.json`; `tally_of` reads it back."""
    statistics, verdicts = tally.statistics, tally.statistics.verdicts
    return {
        "seconds": tally.seconds,
        "seconds_per_image": tally.seconds / tally.images if tally.images else None,
        "statistics": {
            "images": tally.images,
            **asdict(verdicts),
            "acceptance_rate": verdicts.acceptance_rate,
            "mean_distance": statistics.mean_distance,
            "prefilled": statistics.prefilled,
            "target_rounds": statistics.target_rounds,
            "target_calls": statistics.target_calls,
            "draft_calls": statistics.draft_calls,
            "rounds": {str(k): asdict(v) for k, v in sorted(statistics.rounds.items())},
        },
        "graphs": {name: asdict(stats) for name, stats in tally.calls.items()},
    }


def tally_of(record: dict[str, Any]) -> Tally | None:
    """The tally behind the `figures` in a record, but for its distances; None if they are none."""
    try:
        counts = record["statistics"]
        statistics = {
            "verdicts": {item.name: counts[item.name] for item in fields(Verdicts)},
            "rounds": counts["rounds"],
            **{
                name: counts[name]
                for name in ("target_rounds", "target_calls", "draft_calls", "prefilled")
            },
        }
        found = {
            "images": counts["images"],
            "seconds": record["seconds"],
            "statistics": statistics,
            "calls": record["graphs"],
        }
    except (KeyError, TypeError):
        return None
    return read_tally(found)


def environment() -> dict[str, str]:
    """Versions and hardware that figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpus": str(available_cpus()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def tool_version() -> str:
    """Version of the installed package."""
    return importlib.metadata.version("cspd")
