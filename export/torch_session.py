"""The PyTorch backend: the reference modules with the weights of a bundle."""

from __future__ import annotations

from functools import lru_cache

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cspd.engines.bundle import Bundle
from cspd.engines.cpus import limit_torch_threads
from cspd.engines.errors import BundleError
from cspd.engines.session import Session, TorchSession, torch_device
from cspd.export.assemble import assemble_mar, assemble_vae
from cspd.export.graphs import PixelDecoder
from cspd.export.mar import DiffusionLoss, Mar
from cspd.export.networks import model_graphs
from cspd.export.presets import MarConfig


def open_session(bundle: Bundle, label: str, *, device: str, threads: int) -> Session:
    """Session that runs graph `label` of `bundle` in PyTorch."""
    limit_torch_threads(threads)
    try:
        module = decoder_module(bundle) if label == "decoder" else graph_module(bundle, label)
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise BundleError(
            f"{bundle.folder}: weights and settings of {label} do not fit together "
            f"({type(error).__name__}: {error}); rebuild it with cspd-export build"
        ) from error
    return TorchSession(bundle.graph(label).spec, module, torch_device(device))


def graph_module(bundle: Bundle, label: str) -> nn.Module:
    """The module behind a graph such as "target/backbone"."""
    role, _, name = label.partition("/")
    record = bundle.manifest.models[role]  # type: ignore[index]
    weights = str(bundle.file(record.weights))
    config = MarConfig(**record.config)
    model = _load_mar(weights, config, record.precision)
    exact = None
    if record.first_weights is not None:
        exact = DiffusionLoss(config)
        first = load_file(bundle.file(record.first_weights))
        exact.load_state_dict({n.removeprefix("diffloss."): t for n, t in first.items()})
    return model_graphs(model, 1, 1, record.precision, exact, hoisted=True)[name][0]


def decoder_module(bundle: Bundle) -> nn.Module:
    """The module behind the decoder graph."""
    manifest = bundle.manifest
    if manifest.decoder_weights is None:
        return PixelDecoder(manifest.geometry.image_size // manifest.geometry.grid)
    return assemble_vae(
        load_file(bundle.file(manifest.decoder_weights)), manifest.decoder_precision
    )


@lru_cache(maxsize=2)
def _load_mar(weights: str, config: MarConfig, precision: str) -> Mar:
    """One model in memory for all graphs that share it."""
    return assemble_mar(config, load_file(weights), precision)
