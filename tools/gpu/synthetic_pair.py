"""Pairs of published sizes with random weights, in memory only: SYNTHETIC, for time and memory.

No graph is exported and no file is written, so that a GPU is asked within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cspd.engines.bundle import Bundle
from cspd.engines.manifest import FileRecord, Geometry, GraphRecord, Manifest, ModelRecord
from cspd.engines.schedule import ScheduleSpec
from cspd.engines.sessions.session import Session, TorchSession
from cspd.engines.spec import GraphSpec
from cspd.export.graphs.denoiser import decoder_spec
from cspd.export.graphs.networks import model_graphs
from cspd.export.mar.assemble import assemble_mar, assemble_vae
from cspd.export.mar.model import DiffusionLoss, Mar
from cspd.export.mar.presets import PRESETS
from cspd.export.mar.vae import VaeDecoder
from cspd.export.torch_session import compile_blocks
from cspd.export.weights.random import random_state

NOWHERE = "in memory"
NO_FILE = FileRecord(sha256="0" * 64, bytes=0)
MAX_ROWS = 4096

Graphs = dict[str, tuple[nn.Module, GraphSpec]]


@dataclass
class SyntheticPair:
    """Models of `presets` by role, in `precision` on `device`, for up to `max_batch` sequences.

    Their blocks are compiled if `compiled`.
    """

    presets: dict[str, str]
    precision: str
    device: torch.device
    max_batch: int
    compiled: bool = False
    graphs: dict[str, Graphs] = field(init=False)

    def __post_init__(self) -> None:
        self.graphs = {role: self._model(preset) for role, preset in self.presets.items()}
        with torch.device("meta"):
            decoder = VaeDecoder()
        state = random_state(decoder, 0, device=self.device)
        image = (3, 16 * PRESETS[self.presets["target"]].grid)
        spec = decoder_spec(PRESETS[self.presets["target"]].grid, 16, image, self.max_batch)
        self.graphs["decoder"] = {"": (assemble_vae(state, self.precision), spec)}

    def _model(self, preset: str) -> Graphs:
        config = PRESETS[preset]
        with torch.device("meta"):
            model = Mar(config)
        state = random_state(model, 0, device=self.device)
        exact: DiffusionLoss | None = None
        if self.precision != "fp32":
            exact = DiffusionLoss(config)
            head = {n.removeprefix("diffloss."): t for n, t in state.items() if "diffloss" in n}
            exact.load_state_dict(head, assign=True)
            exact = exact.requires_grad_(False).eval()
        low = assemble_mar(config, state, self.precision)
        args = self.max_batch, MAX_ROWS, self.precision
        graphs = model_graphs(low, *args, low.diffloss, hoisted=True)
        if exact is not None:
            graphs["denoiser_first"] = model_graphs(low, *args, exact)["denoiser_first"]
        for module, _ in graphs.values():
            if self.compiled:
                compile_blocks(module)
        return graphs

    @property
    def bundle(self) -> Bundle:
        """A bundle whose manifest is true of the models, and whose folder does not exist."""
        target = PRESETS[self.presets["target"]]
        models: dict[str, Any] = {
            role: ModelRecord(
                preset=preset, config=vars(PRESETS[preset]), weights=NOWHERE, source="random",
                source_sha256=None, precision=self.precision,  # type: ignore[arg-type]
                first_weights=None if self.precision == "fp32" else NOWHERE,
                graphs={name: _record(spec) for name, (_, spec) in self.graphs[role].items()},
            )
            for role, preset in self.presets.items()
        }  # fmt: skip
        manifest = Manifest(
            tool_version="0", libraries={}, opset=0, synthetic=True,
            geometry=Geometry(
                grid=target.grid, token_dim=16, num_classes=target.num_classes, image_channels=3,
                image_size=16 * target.grid,
            ),
            class_names=tuple(map(str, range(target.num_classes))), schedule=ScheduleSpec(),
            models=models, decoder=_record(self.graphs["decoder"][""][1]),
            decoder_weights=NOWHERE, files={NOWHERE: NO_FILE},
        )  # fmt: skip
        return Bundle(Path(NOWHERE), manifest)

    def open(self, bundle: Bundle, label: str, backend: str, **options: Any) -> Session:
        """Session of a graph of the pair: an opener."""
        role, _, name = label.partition("/")
        module, spec = self.graphs[role][name]
        return TorchSession(spec, module, self.device)


def _record(spec: GraphSpec) -> GraphRecord:
    return GraphRecord(spec=spec, file=NOWHERE, measured_error=0.0)
