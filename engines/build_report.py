"""The record of a finished engine, part of the manifest, and the shapes that it takes."""

from __future__ import annotations

from cspd.engines.spec import GraphSpec, Record

# Min, opt and max shape of every input by name.
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class BuildReport(Record):
    """What was built, and all that must be checked before it is loaded; part of the manifest.

    `profile` lists min, opt, max shape of each input; `peak_memory_bytes` is the highest resident
    size of this process during the build, mapped weight files included (None where the system does
    not tell); `gpu` is the one that `tensorrt` built on.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    profile: Profile
    sha256: str
    bytes: int
    seconds: float
    peak_memory_bytes: int | None


def profile_shapes(spec: GraphSpec) -> Profile:
    """Min, opt and max shape of every input.

    A minimum of 0 (no visible token yet) is passed on: TensorRT takes empty tensors.
    """
    low, opt, high = (spec.sizes(which) for which in ("min", "opt", "max"))
    return {t.name: (t.sizes(low), t.sizes(opt), t.sizes(high)) for t in spec.inputs}
