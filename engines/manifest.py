"""The manifest of a bundle: everything a run needs to know, checked when it is read.

Nothing outside the manifest is guessed, and file names carry no meaning.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cspd.engines.build_report import BuildReport
from cspd.engines.schedule import AnySchedule
from cspd.engines.spec import NAME_PATTERN, GraphSpec, Record

SCHEMA_VERSION: Literal[1] = 1
SHA256 = r"^[0-9a-f]{64}$"
MAX_NAME = 200  # characters of a class's name, of which the longest of ImageNet has 30
ENGINE_PATTERN = r"^[a-z][a-z0-9-]*$"
Role = Literal["target", "draft"]
Precision = Literal["fp32", "fp16", "bf16"]


class FileRecord(Record):
    """Identity of one file of the bundle."""

    sha256: str = Field(pattern=SHA256)
    bytes: int = Field(ge=0)


class EngineRecord(BuildReport):
    """A serialized engine: its file, and everything its build reported."""

    file: str


class GraphRecord(Record):
    """One graph: its contract, its ONNX file, its engines by backend, its measured error."""

    spec: GraphSpec
    file: str
    engines: dict[Annotated[str, Field(pattern=ENGINE_PATTERN)], EngineRecord] = Field(
        default_factory=dict
    )
    # Largest relative error of the norm of any output against PyTorch in float32, of the ONNX file
    # on the CPU; or of the PyTorch module behind it, where ONNX Runtime lacks the number format.
    measured_error: float
    measured_by: Literal["onnxruntime", "torch"] = "onnxruntime"


class ImageEffect(Record):
    """What reduced precision does to a whole image, against PyTorch in float32 and one noise.

    `tokens_error` is the relative error of the norm of all tokens, `psnr` that of the pixels in
    decibels; of one image in `num_iter` autoregressive and `head_steps` denoising steps.
    """

    tokens_error: float
    psnr: float
    num_iter: int
    head_steps: int
    measured_by: Literal["onnxruntime", "torch"]


class ModelRecord(Record):
    """One member of the pair; `image_effect` is None for models in float32."""

    preset: str
    config: dict[str, Any]
    weights: str
    # Float32 weights of the head for the first denoising step, of models in reduced precision.
    first_weights: str | None = None
    source: str
    source_sha256: str | None
    precision: Precision
    image_effect: ImageEffect | None = None
    graphs: dict[Annotated[str, Field(pattern=NAME_PATTERN)], GraphRecord]


class Geometry(Record):
    """What draft, target and decoder must agree on."""

    grid: int = Field(ge=1)
    token_dim: int = Field(ge=1)
    num_classes: int = Field(ge=1)
    image_channels: Literal[1, 3]
    image_size: int = Field(ge=1)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.grid * self.grid


class Manifest(Record):
    """Contents of `manifest.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str
    libraries: dict[str, str]
    opset: int
    # Weights are random: figures from this bundle say nothing about image quality.
    synthetic: bool = False
    # Which models these are: what their graphs take and return. Bundles of old say nothing: MAR.
    family: str = Field("mar", pattern="^[a-z0-9-]{1,32}$")
    geometry: Geometry
    class_names: tuple[Annotated[str, Field(max_length=MAX_NAME)], ...]
    schedule: AnySchedule
    # Settings that the model is best used with, named as in run.json: num_iter, cfg and so on.
    defaults: dict[str, Any] = Field(default_factory=dict)
    models: dict[Role, ModelRecord]
    decoder: GraphRecord
    # None for pixel-space models, whose decoder has no weights.
    decoder_weights: str | None = None
    decoder_precision: Precision = "fp32"
    files: dict[str, FileRecord]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            path = PurePosixPath(name)
            odd = "\\" in name or not name.isprintable() or str(path) != name
            if odd or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"file name {name!r} leaves the bundle")
        return files

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if "target" not in self.models:
            raise ValueError("the bundle has no target model")
        if len(self.class_names) != self.geometry.num_classes:
            raise ValueError(
                f"{len(self.class_names)} class names for {self.geometry.num_classes} classes"
            )
        unlisted = set(self.referenced_files()) - set(self.files)
        if unlisted:
            raise ValueError(f"files without a hash: {sorted(unlisted)}")
        return self

    def graphs(self) -> dict[str, GraphRecord]:
        """Every graph by its label, such as "target/backbone"."""
        graphs = {
            f"{role}/{name}": graph
            for role, model in self.models.items()
            for name, graph in model.graphs.items()
        }
        return {**graphs, "decoder": self.decoder}

    def weights(self) -> list[str]:
        """Every file of weights, all of them safetensors."""
        models = self.models.values()
        names = [name for model in models for name in (model.weights, model.first_weights)]
        return [name for name in (*names, self.decoder_weights) if name]

    def referenced_files(self) -> list[str]:
        """Every file that a model, a graph or an engine names."""
        graphs = list(self.graphs().values())
        names = self.weights() + [graph.file for graph in graphs]
        return names + [engine.file for graph in graphs for engine in graph.engines.values()]
