"""What decoding takes for granted about the graphs of a bundle, checked once before it begins."""

from __future__ import annotations

from cspd.engines.errors import BundleError
from cspd.engines.manifest import Geometry, Manifest
from cspd.engines.spec import GraphSpec, TensorSpec

# Axes of each graph that the code names.
AXES = {
    "backbone": ("batch",),
    "denoiser": ("rows", "tokens"),
    "denoiser_first": ("rows", "tokens"),
    "denoiser_loop": ("rows",),
    "speculative_round": ("rows",),
    "speculative_loop": ("tokens", "window"),
    "head_modulation": ("tokens", "steps"),
    "denoiser_hoisted": ("rows", "tokens"),
    "speculative_round_hoisted": ("rows",),
    "decoder": ("batch",),
}
INTEGERS = ("next_step", "moved", "drawn")  # outputs that count; all others are float32
# A shape; None stands for a size that the bundle is free to choose.
Shape = tuple[int | str | None, ...]


FAMILIES = ("mar",)  # whose models `Pipeline` makes of a bundle's graphs


def check_graphs(manifest: Manifest) -> None:
    """Raise BundleError unless every graph fits the code and the geometry of `manifest`."""
    if manifest.family not in FAMILIES:
        raise BundleError(
            f"manifest.json: family is {manifest.family!r}, this version runs "
            f"{', '.join(FAMILIES)}; use the version of cspd that built the bundle"
        )
    shapes = _shapes(manifest.geometry)
    for label, graph in manifest.graphs().items():
        name = label.rpartition("/")[2]
        if name in AXES:
            _check_axes(label, graph.spec, AXES[name])
            inputs, outputs = shapes[name]
            _check_tensors(label, "input", graph.spec.inputs, inputs)
            _check_tensors(label, "output", graph.spec.outputs, outputs)


def _shapes(geometry: Geometry) -> dict[str, tuple[dict[str, Shape], dict[str, Shape]]]:
    """By graph, the shapes of the inputs that follow from the geometry, and of the outputs."""
    grid, channels, size = geometry.grid, geometry.token_dim, geometry.image_size
    rows: Shape = ("rows", channels)
    step = {"x": rows}, _all(("mean", "log_std"), rows)
    state = ("next_x", "next_x0", "next_fraction", "mean", "log_std", "sum_log_std")
    advanced = {**_all(state, ("tokens", channels)), "next_step": ("tokens",)}
    one_round = {**advanced, **_all(("moved", "drawn"), ("tokens",))}
    rounds = {**advanced, **_all(("moved", "drawn"), ("tokens", "pool"))}
    return {
        "backbone": (
            {"tokens": ("batch", grid * grid, channels)}, {"z": ("batch", "positions", None)},
        ),
        "denoiser": step,
        "denoiser_first": step,
        "denoiser_hoisted": step,
        "denoiser_loop": (
            {"noise0": rows}, _all(("sample", "mean", "log_std", "sum_log_std"), rows),
        ),
        "speculative_round": ({}, one_round),
        "speculative_round_hoisted": ({}, one_round),
        "speculative_loop": ({}, rounds),
        "head_modulation": ({}, {"modulation": ("tokens", "steps", "branches", None)}),
        "decoder": (
            {"latents": ("batch", channels, grid, grid)},
            {"images": ("batch", geometry.image_channels, size, size)},
        ),
    }  # fmt: skip


def _all(names: tuple[str, ...], shape: Shape) -> dict[str, Shape]:
    return dict.fromkeys(names, shape)


def _check_axes(label: str, spec: GraphSpec, axes: tuple[str, ...]) -> None:
    for name in axes:
        if name not in spec.axes:
            raise BundleError(
                f"{label}: has no axis {name}; rebuild the bundle with cspd-export build"
            )


def _check_tensors(
    label: str, kind: str, tensors: tuple[TensorSpec, ...], shapes: dict[str, Shape]
) -> None:
    found = {tensor.name: tensor for tensor in tensors}
    for name, expected in shapes.items():
        if name not in found:
            raise BundleError(
                f"{label}: has no {kind} {name}; rebuild the bundle with cspd-export build"
            )
        dtype = "int32" if name in INTEGERS else "float32"
        tensor = found[name]
        fits = tensor.dtype == dtype and len(tensor.shape) == len(expected)
        if not fits or any(b not in (None, a) for a, b in zip(tensor.shape, expected, strict=True)):
            shown = ["any" if size is None else size for size in expected]
            raise BundleError(
                f"{label}: {name} is {tensor.dtype} {list(tensor.shape)}, the geometry of the "
                f"bundle says {dtype} {shown}; rebuild it with cspd-export build"
            )
