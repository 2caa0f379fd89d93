"""What the server takes and returns: requests with bounds for everything, answers, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.spec import Record
from cspd.runtime.config import MAX_SEED, RunConfig, check_config
from cspd.runtime.heads import DEFAULT_WINDOW
from cspd.runtime.settings import configure

MAX_IMAGES = 16
# Without "auto", whose choices are measured: see `configuration`.
Served = Literal["target", "cspd", "lossless", "draft"]
# Fields of a request that are no sampling option of `RunConfig`.
NOT_SAMPLING = {"label", "n"}


class Settings(Record):
    """How one server runs; `key_sha256` is the hash of the API key, None if none is asked for."""

    bundle: Path
    backend: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 0
    batch_size: int = 8
    replicas: int = 1
    max_queue: int = 64
    max_body: int = 1 << 16
    timeout: float = 120.0
    hosts: tuple[str, ...] = ()
    key_sha256: str | None = None


class ImageRequest(BaseModel):
    """Images of one class. What is left out is the bundle's default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    label: (
        Annotated[int, Field(ge=0, le=10**6)] | Annotated[str, Field(min_length=1, max_length=120)]
    ) = Field(description="Number or name of the class.")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Number of images: 0 to n-1 of the seed.")
    method: Served | None = None
    seed: int = Field(0, ge=0, le=MAX_SEED)
    num_iter: int | None = Field(None, ge=1, le=4096, description="Autoregressive steps.")
    head_steps: int | None = Field(None, ge=2, le=1000, description="Denoising steps of the head.")
    cfg: float | None = Field(None, ge=0, le=100, allow_inf_nan=False, description="Guidance.")
    cfg_schedule: Literal["linear", "constant"] | None = None
    temperature: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    gamma: int | None = Field(None, ge=1, le=4096)
    prefill: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    accept_temperature: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    verify: Literal["parallel", "prefix"] | None = None
    align: bool | None = None
    on_reject: Literal["target", "residual"] | None = None
    residual_temperature: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    count_in: Literal["tokens", "steps"] | None = None
    as_released: bool | None = Field(None, description="cspd as its authors released it.")
    window: int | None = Field(None, ge=1, le=64)


class ImageAnswer(Record):
    """One image: base64 PNG, the fate of its drafted tokens, the cost of the batch it was in.

    `seconds` is the time of its whole batch of `batch` images without previews, `waited` the time
    before that.
    """

    index: int
    label: int
    class_name: str
    png: str
    seconds: float
    waited: float
    batch: int
    proposed: int
    accepted: int
    acceptance_rate: float | None
    target_rounds: int
    target_calls: int
    draft_calls: int


class ImagesAnswer(Record):
    """All images of a request, and what makes them again."""

    id: str
    law: str
    config: dict[str, Any]
    bundle: str
    images: list[ImageAnswer]


class ModelAnswer(Record):
    """A bundle that is served: its classes, methods, size and default settings."""

    id: str
    classes: tuple[str, ...]
    methods: tuple[str, ...]
    grid: int
    image_size: int
    image_channels: int
    defaults: dict[str, float | int | str]
    synthetic: bool
    batch_size: int
    max_images: int


class ModelsAnswer(Record):
    """The list of bundles that are served: one."""

    data: list[ModelAnswer]


class Problem(Record):
    """What went wrong, with the id that the logs have too."""

    id: str
    code: str
    message: str


class ErrorAnswer(Record):
    """Body of every answer that is an error."""

    error: Problem


class HealthAnswer(Record):
    """Whether the server lives, or is ready."""

    status: Literal["ok", "starting"]


def methods_of(bundle: Bundle) -> tuple[Served, ...]:
    """Methods that `bundle` can run."""
    both = "draft" in bundle.manifest.models
    round_graph = "target/speculative_round" in bundle.manifest.graphs()
    offered: dict[Served, bool] = {
        "target": True,
        "cspd": both,
        "lossless": round_graph,
        "draft": both,
    }
    return tuple(method for method, can in offered.items() if can)


def describe(bundle: Bundle, settings: Settings) -> ModelAnswer:
    """What a client needs to know to ask for images."""
    geometry = bundle.manifest.geometry
    return ModelAnswer(
        id=bundle.sha256,
        classes=bundle.manifest.class_names,
        methods=methods_of(bundle),
        grid=geometry.grid,
        image_size=geometry.image_size,
        image_channels=geometry.image_channels,
        defaults=bundle.manifest.defaults,
        synthetic=bundle.manifest.synthetic,
        batch_size=settings.batch_size,
        max_images=MAX_IMAGES,
    )


def configuration(request: ImageRequest, bundle: Bundle, settings: Settings) -> RunConfig:
    """The run that `cspd-run generate` would do for `request`; CspdError if the bundle cannot."""
    names = bundle.manifest.class_names
    if isinstance(request.label, int):
        label = request.label
    elif request.label in names:
        label = names.index(request.label)
    else:
        raise CspdError(f"label: no class {request.label!r}; GET /v1/models lists the classes")
    sampling = request.model_dump(exclude=NOT_SAMPLING, exclude_none=True)
    sampling |= {
        "num_images": request.n,
        "batch_size": settings.batch_size,
        "backend": settings.backend,
    }
    if request.method == "lossless":
        # Choices by measured costs would differ from machine to machine.
        sampling.setdefault("window", DEFAULT_WINDOW)
    config = configure(bundle, str(label), sampling)
    check_config(config, bundle.manifest)
    if config.method not in methods_of(bundle):
        raise CspdError(f"method: the bundle has no graph for {config.method}")
    return config
