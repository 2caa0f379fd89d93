"""What the server takes and returns: requests with bounds for everything, answers, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cspd.engines.spec import Record
from cspd.runtime.config import MAX_SEED

MAX_IMAGES = 16
# Without "auto", whose choices are measured: see `bundle.configuration`.
Served = Literal["target", "cspd", "lossless", "draft"]


class Bound(Record):
    """What a number in a request may be: `min` to `max`, `min` itself not if it is `open`."""

    min: int | float
    max: int | float
    open: bool = False

    def holds(self, value: int | float) -> bool:
        """Whether `value` is allowed."""
        return (value > self.min if self.open else value >= self.min) and value <= self.max

    def __str__(self) -> str:
        if self.open:
            return f"more than {self.min:g} and at most {self.max:g}"
        return f"{self.min}..{self.max}"


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
    before that. `head_calls` counts the evaluations of the target's head that had to wait for one
    another, `plain_head_calls` those that stepping plainly takes.
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
    head_calls: int
    plain_head_calls: int


class ImagesAnswer(Record):
    """All images of a request, and what makes them again."""

    id: str
    distribution: str
    config: dict[str, Any]
    bundle: str
    images: list[ImageAnswer]


class ModelAnswer(Record):
    """A bundle that is served: its classes, methods, size, default settings and their bounds.

    `shipped`: it is the pair inside the package, which `cspd-run generate` takes without a name.
    """

    id: str
    classes: tuple[str, ...]
    methods: tuple[str, ...]
    grid: int
    image_size: int
    image_channels: int
    defaults: dict[str, bool | float | int | str]
    bounds: dict[str, Bound]
    synthetic: bool
    shipped: bool
    batch_size: int
    max_images: int


class ModelsAnswer(Record):
    """The list of bundles that are served: one."""

    data: list[ModelAnswer]


class Problem(Record):
    """What went wrong, in which field if in one, with the id that the logs have too."""

    id: str
    code: str
    message: str
    field: str | None = None


class ErrorAnswer(Record):
    """Body of every answer that is an error."""

    error: Problem


class HealthAnswer(Record):
    """Whether the server lives, or is ready."""

    status: Literal["ok", "starting", "stopping"]
