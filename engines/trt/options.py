"""Options of an engine build."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cspd.engines.errors import CspdError
from cspd.engines.trt.api import FLAVOURS


@dataclass(frozen=True)
class BuildOptions:
    """How to build; refuses what the flavour cannot do, in the words of the command line.

    `compute_capabilities` such as ("8.9",): GPUs the engine is for, tensorrt-rtx only; empty means
    the library's default, Ampere and later. `workspace_bytes` limits the scratch memory of a layer.
    """

    flavour: str = "tensorrt-rtx"
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int = 3
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            raise CspdError(f"--backend: got {self.flavour!r}, expected one of {sorted(FLAVOURS)}")
        if not 0 <= self.optimization_level <= 5:
            raise CspdError(f"--opt-level: got {self.optimization_level}, expected 0..5")
        if self.workspace_bytes is not None and self.workspace_bytes < 1 << 20:
            raise CspdError(
                f"--workspace: got {self.workspace_bytes} bytes, expected 1 MiB or more"
            )
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise CspdError(f"--compute-capability: got {capability!r}, expected e.g. 8.9")
        if self.flavour == "tensorrt" and self.compute_capabilities:
            raise CspdError(
                "--compute-capability: tensorrt builds for the GPU it runs on; leave it out"
            )
        if self.flavour == "tensorrt-rtx":
            self._refuse_for_rtx()

    def _refuse_for_rtx(self) -> None:
        refused = {
            "--timing-cache": (self.timing_cache, "it would ask for a GPU and save no time"),
            "--version-compatible": (self.version_compatible, "the wheel has no lean runtime"),
            "--hardware-compatible": (self.hardware_compatible, "use --compute-capability"),
        }
        for option, (value, reason) in refused.items():
            if value:
                raise CspdError(f"{option}: not for tensorrt-rtx ({reason})")
