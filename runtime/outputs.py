"""The folder that a run leaves: images, `images.jsonl`, `grid.png`, `run.json`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.session import CallStats
from cspd.runtime import images
from cspd.runtime.config import RunConfig
from cspd.runtime.law import certificate, law
from cspd.runtime.pipeline import GeneratedImage
from cspd.runtime.stats import Statistics

RUN_SCHEMA = 1
IMAGE_SCHEMA = 1
GRID_LIMIT = 64
RUN, IMAGES, GRID = "run.json", "images.jsonl", "grid.png"


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make `folder` ready; CspdError if it holds anything but a run that may be overwritten."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".cspd-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CspdError(
            f"{folder}: cannot write there: {error.strerror}; choose another --out"
        ) from None
    found = [path for path in folder.iterdir() if path.name != ".cspd-probe"]
    if not found:
        return
    if not overwrite:
        raise CspdError(f"{folder}: is not empty; choose another --out or add --overwrite")
    if not (folder / RUN).is_file():
        raise CspdError(f"{folder}: holds files that are not a finished run; choose another --out")
    for path in found:
        if path.name in (RUN, IMAGES, GRID) or (path.suffix == ".png" and path.stem.isdecimal()):
            path.unlink()


def image_metadata(config: RunConfig, bundle: Bundle, image: GeneratedImage) -> dict[str, Any]:
    """What a PNG says about itself: enough to make it again."""
    return {
        "schema": IMAGE_SCHEMA,
        "image": image.index,
        "label": image.label,
        "class": bundle.manifest.class_names[image.label],
        "config": config.model_dump(mode="json"),
        "bundle": bundle.sha256,
        "tool": tool_version(),
        **({"synthetic": True} if bundle.manifest.synthetic else {}),
    }


@dataclass
class RunFolder:
    """Writes a run image by image; `finish` adds what is known only at the end."""

    folder: Path
    config: RunConfig
    bundle: Bundle
    _shown: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def add(self, image: GeneratedImage) -> None:
        """Write one image, then its line in `images.jsonl`."""
        name = f"{image.index:05d}.png"
        metadata = image_metadata(self.config, self.bundle, image)
        images.write_png(self.folder / name, image.pixels, metadata)
        line = {
            "image": image.index,
            "file": name,
            "label": image.label,
            "class": metadata["class"],
            "sha256": hashlib.sha256((self.folder / name).read_bytes()).hexdigest(),
            **asdict(image.verdicts),
        }
        with (self.folder / IMAGES).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if len(self._shown) < GRID_LIMIT:
            self._shown.append((image.pixels, metadata["class"]))

    def finish(self, record: dict[str, Any]) -> None:
        """Write the grid and `run.json`."""
        pixels, captions = zip(*self._shown, strict=True)
        images.grid(list(pixels), list(captions)).save(self.folder / GRID)
        temporary = self.folder / f".{RUN}.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, self.folder / RUN)


def run_record(
    config: RunConfig, bundle: Bundle, statistics: Statistics, seconds: float,
    calls: dict[str, CallStats],
) -> dict[str, Any]:  # fmt: skip
    """The contents of `run.json`: configuration, versions, hashes, statistics, time per graph."""
    verdicts = statistics.verdicts
    return {
        "schema": RUN_SCHEMA,
        "tool": tool_version(),
        "bundle": {"sha256": bundle.sha256, "synthetic": bundle.manifest.synthetic},
        "law": law(config, bundle.manifest),
        "certificate": certificate(config),
        "config": config.model_dump(mode="json"),
        "images": config.num_images,
        "seconds": seconds,
        "seconds_per_image": seconds / config.num_images,
        "statistics": {
            **asdict(verdicts),
            "acceptance_rate": verdicts.acceptance_rate,
            "mean_distance": statistics.mean_distance,
            "prefilled": statistics.prefilled,
            "target_calls": statistics.target_steps,
            "draft_calls": statistics.draft_steps,
            "rounds": {str(k): asdict(v) for k, v in sorted(statistics.rounds.items())},
        },
        "graphs": {name: asdict(stats) for name, stats in calls.items()},
        "host": environment(),
    }


def environment() -> dict[str, str]:
    """Versions and hardware that figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def tool_version() -> str:
    """Version of the installed package."""
    return importlib.metadata.version("cspd")
