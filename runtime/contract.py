"""What decoding takes for granted about the graphs of a bundle, checked once before it begins."""

from __future__ import annotations

from typing import NamedTuple

from cspd.engines.errors import BundleError
from cspd.engines.manifest import Geometry, Manifest
from cspd.engines.spec import GraphSpec


class Needs(NamedTuple):
    """Axes and outputs of one graph that the code names."""

    axes: tuple[str, ...]
    outputs: tuple[str, ...]


STEP = Needs(("rows", "tokens"), ("mean", "log_std"))
ROUND = Needs(("rows",), ("next_x", "next_step", "moved", "drawn"))
NEEDS = {
    "backbone": Needs(("batch",), ("z",)),
    "denoiser": STEP,
    "denoiser_first": STEP,
    "denoiser_loop": Needs(("rows",), ("sample", "mean", "log_std", "sum_log_std")),
    "speculative_round": ROUND,
    "speculative_loop": Needs(("tokens", "window"), ("next_x", "next_step", "moved", "drawn")),
    "head_modulation": Needs(("tokens", "steps"), ("modulation",)),
    "denoiser_hoisted": STEP,
    "speculative_round_hoisted": ROUND,
    "decoder": Needs(("batch",), ("images",)),
}


def check_graphs(manifest: Manifest) -> None:
    """Raise BundleError unless every graph fits the code and the geometry of `manifest`."""
    for label, graph in manifest.graphs().items():
        name = label.rpartition("/")[2]
        if name in NEEDS:
            _check_names(label, graph.spec, NEEDS[name])
            _check_shapes(label, graph.spec, _shapes(manifest.geometry).get(name, {}))


def _shapes(geometry: Geometry) -> dict[str, dict[str, tuple[int | str, ...]]]:
    """Shapes that follow from the geometry, by graph and tensor."""
    grid, channels, size = geometry.grid, geometry.token_dim, geometry.image_size
    return {
        "backbone": {"tokens": ("batch", grid * grid, channels)},
        "denoiser": {"x": ("rows", channels)},
        "denoiser_hoisted": {"x": ("rows", channels)},
        "denoiser_loop": {"noise0": ("rows", channels)},
        "decoder": {
            "latents": ("batch", channels, grid, grid),
            "images": ("batch", geometry.image_channels, size, size),
        },
    }


def _check_names(label: str, spec: GraphSpec, needs: Needs) -> None:
    for what, expected, found in (
        ("axis", needs.axes, set(spec.axes)),
        ("output", needs.outputs, {tensor.name for tensor in spec.outputs}),
    ):
        for name in expected:
            if name not in found:
                raise BundleError(
                    f"{label}: has no {what} {name}; rebuild the bundle with cspd-export build"
                )


def _check_shapes(label: str, spec: GraphSpec, shapes: dict[str, tuple[int | str, ...]]) -> None:
    found = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
    for name, expected in shapes.items():
        if found.get(name) != expected:
            raise BundleError(
                f"{label}: {name} is {list(found.get(name, ()))}, the geometry of the bundle says "
                f"{list(expected)}; rebuild it with cspd-export build"
            )
