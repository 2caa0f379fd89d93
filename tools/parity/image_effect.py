"""One image by a bundle in reduced precision and by PyTorch in float32, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cspd.engines.bundle import Bundle
from cspd.engines.manifest import ImageEffect
from cspd.engines.memory import release_memory
from cspd.engines.sessions.session import Session
from cspd.runtime.config import make_config
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.tools.parity.measure import measure
from cspd.tools.parity.rungs import psnr, trace_image

# Few, because a full-size model needs seconds for each on a small machine.
NUM_ITER, HEAD_STEPS = 2, 10


def measure_image_effect(
    bundle: Bundle, role: str, reference: Callable[[], Mapping[str, Session]]
) -> ImageEffect:
    """Difference of an image of model `role` by the graphs of `bundle` from that by `reference`.

    `reference` opens the sessions of plain sampling; they are closed before those of the bundle
    are opened. ONNX Runtime runs the graphs, PyTorch where that lacks the number format.
    """
    manifest = bundle.manifest
    measured_by = bundle.graph(f"{role}/backbone").measured_by
    values = {**manifest.defaults, "method": role, "labels": (0,), "num_images": 1}
    values |= {"num_iter": min(NUM_ITER, manifest.geometry.num_tokens)}
    config = make_config(**{**values, "head_steps": HEAD_STEPS, "batch_size": 1})
    exact = dict(reference())
    sessions = Sessions(bundle, "torch", opener=lambda _, label, *__, **___: exact[label])
    steps, pixels = trace_image(Pipeline(sessions), config)
    exact.clear()
    sessions.opened.clear()
    release_memory()
    got_steps, got_pixels = trace_image(Pipeline(Sessions(bundle, measured_by)), config)
    release_memory()
    return ImageEffect(
        tokens_error=measure(got_steps[-1], steps[-1]).norm,
        psnr=psnr(got_pixels[0], pixels[0]),
        num_iter=config.num_iter,
        head_steps=config.head_steps,
        measured_by=measured_by,
    )
