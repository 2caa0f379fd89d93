"""What the served bundle offers, and the run that a request asks it for."""

from __future__ import annotations

from typing import Any

from cspd.engines.bundle import Bundle, open_bundle
from cspd.engines.errors import CspdError
from cspd.engines.words import setting, speaking
from cspd.runtime.config import RunConfig, check_config
from cspd.runtime.serve.models import (
    MAX_IMAGES,
    Bound,
    ImageRequest,
    ModelAnswer,
    Served,
    Settings,
)  # fmt: skip
from cspd.runtime.serve.words import in_request, near
from cspd.runtime.settings import configure, shipped_bundle, without_measuring

# Fields of a request that are no sampling option of `RunConfig`.
NOT_SAMPLING = {"label", "n"}
ROUND = "target/speculative_round"


def methods_of(bundle: Bundle) -> tuple[Served, ...]:
    """Methods that `bundle` can run."""
    both = "draft" in bundle.manifest.models
    offered: dict[Served, bool] = {
        "target": True,
        "cspd": both,
        "lossless": ROUND in bundle.manifest.graphs(),
        "draft": both,
    }
    return tuple(method for method, can in offered.items() if can)


def bounds(bundle: Bundle) -> dict[str, Bound]:
    """What the numbers in a request for `bundle` may be, by field."""
    manifest = bundle.manifest
    found = {name: bound for name in ImageRequest.model_fields if (bound := _written(name))}
    most = {
        "label": manifest.geometry.num_classes - 1,
        "num_iter": manifest.geometry.num_tokens,
        "gamma": manifest.geometry.num_tokens,
        "head_steps": manifest.schedule.most_steps,
    }
    if ROUND in manifest.graphs():
        most["window"] = bundle.graph(ROUND).spec.axes["window"].max
    update = {name: found[name].model_copy(update={"max": value}) for name, value in most.items()}
    return found | update


def _written(name: str) -> Bound | None:
    """The bound that `ImageRequest` itself has for a field; None for what is no number."""
    if name == "label":
        return Bound(min=0, max=0)
    limits: dict[str, Any] = {}
    for item in ImageRequest.model_fields[name].metadata:
        limits |= {key: getattr(item, key) for key in ("gt", "ge", "le") if hasattr(item, key)}
    if "le" not in limits:
        return None
    return Bound(min=limits.get("gt", limits.get("ge")), max=limits["le"], open="gt" in limits)


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
        bounds=bounds(bundle),
        synthetic=bundle.manifest.synthetic,
        shipped=bundle.sha256 == open_bundle(shipped_bundle()).sha256,
        batch_size=settings.batch_size,
        max_images=MAX_IMAGES,
    )


@speaking(in_request)
def configuration(request: ImageRequest, bundle: Bundle, settings: Settings) -> RunConfig:
    """The run that `cspd-run generate` would do for `request`; CspdError if the bundle cannot.

    Errors are in the words of the request.
    """
    methods, limits, label = methods_of(bundle), bounds(bundle), _label(request, bundle)
    if request.method is not None and request.method not in methods:
        raise CspdError(
            f"{setting('method')} is {request.method!r}, expected one of {', '.join(methods)}"
        )
    for name, bound in limits.items():
        value = label if name == "label" else getattr(request, name)
        if value is not None and not bound.holds(value):
            raise CspdError(f"{setting(name)} is {value}, expected {bound} for this bundle")
    sampling = request.model_dump(exclude=NOT_SAMPLING, exclude_none=True)
    sampling |= {
        "num_images": request.n,
        "batch_size": settings.batch_size,
        "backend": settings.backend,
    }
    config = without_measuring(configure(bundle, str(label), sampling), bundle)
    check_config(config, bundle.manifest)
    return config


def _label(request: ImageRequest, bundle: Bundle) -> int:
    """The number of the class that was asked for."""
    if isinstance(request.label, int):
        return request.label
    names = bundle.manifest.class_names
    if request.label in names:
        return names.index(request.label)
    hint = near(request.label, names) or "; GET /v1/models lists the classes"
    raise CspdError(f"{setting('labels')}: no class {request.label!r:.60}{hint}")
