"""Diffusion heads of published sizes with random weights, exported graph by graph: synthetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from cspd.engines.sessions.ort import ort_session
from cspd.engines.sessions.session import Session, TorchSession
from cspd.engines.spec import GraphSpec
from cspd.export.build_graph import export_any
from cspd.export.graphs.denoiser import DenoiserGraph, denoiser_spec
from cspd.export.graphs.denoiser_loop import DenoiserLoopGraph, denoiser_loop_spec
from cspd.export.graphs.modulation import (
    HeadModulationGraph,
    HoistedDenoiserGraph,
    hoisted_spec,
    modulation_spec,
)
from cspd.export.graphs.speculative_loop import SpeculativeLoopGraph, speculative_loop_spec
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import PRESETS
from cspd.export.onnx.trace import save_graph
from cspd.export.weights.random import random_state

MAX_ROWS = 1024
WEIGHTS = "weights.safetensors"


class _Holder(nn.Module):
    """Gives the head's weights the names that they have in a whole model."""

    def __init__(self, diffloss: DiffusionLoss) -> None:
        super().__init__()
        self.diffloss = diffloss


class SyntheticHead:
    """The head of `preset` with random weights; graphs are exported to `folder` when needed."""

    def __init__(self, preset: str, folder: Path, threads: int = 0) -> None:
        self.preset, self.folder, self.threads = preset, folder, threads
        holder = _Holder(DiffusionLoss(PRESETS[preset]))
        holder.load_state_dict(random_state(holder, seed=0))
        self.module = holder.diffloss.eval()
        save_file(holder.state_dict(), folder / WEIGHTS)

    def graph(self, name: str) -> tuple[nn.Module, GraphSpec]:
        """Module and contract of one of the head's graphs."""
        makers: dict[str, Any] = {
            "denoiser": (DenoiserGraph, denoiser_spec),
            "denoiser_loop": (DenoiserLoopGraph, denoiser_loop_spec),
            "head_modulation": (HeadModulationGraph, modulation_spec),
            "denoiser_hoisted": (HoistedDenoiserGraph, hoisted_spec),
            "speculative_loop": (SpeculativeLoopGraph, speculative_loop_spec),
        }
        module, spec = makers[name]
        return module(self.module), spec(PRESETS[self.preset], MAX_ROWS)

    def file(self, name: str) -> Path:
        """The ONNX file of graph `name`."""
        path = self.folder / f"{name}.onnx"
        if not path.exists():
            module, spec = self.graph(name)
            save_graph(export_any(module, spec), path, self.folder / WEIGHTS)
        return path

    def onnx(self, name: str) -> Session:
        """Graph `name` in ONNX Runtime."""
        return ort_session(str(self.file(name)), self.graph(name)[1], threads=self.threads)

    def torch(self, name: str) -> Session:
        """Graph `name` in PyTorch."""
        module, spec = self.graph(name)
        return TorchSession(spec, module, torch.device("cpu"))
