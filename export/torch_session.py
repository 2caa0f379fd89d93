"""The PyTorch backend: the reference modules with the weights of a bundle.

It makes every graph of a model from the weights, also those that the bundle does not hold. On a GPU
the whole head of a model in reduced precision is in that precision, but for the first step of a
chain (`denoiser_first`): without tensor cores the products would take many times as long.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cspd.engines.bundle import Bundle
from cspd.engines.cpus import limit_torch_threads
from cspd.engines.errors import BundleError, CspdError
from cspd.engines.sessions.session import Session, TorchSession, torch_device
from cspd.engines.spec import GraphSpec
from cspd.export.graphs.denoiser import PixelDecoder
from cspd.export.graphs.networks import FIRST, model_graphs
from cspd.export.mar.assemble import assemble_mar, assemble_vae
from cspd.export.mar.head import DiffusionHead, FinalLayer, ResBlock, TimeEmbedding
from cspd.export.mar.layers import Block
from cspd.export.mar.model import DiffusionLoss, Mar
from cspd.export.mar.presets import MarConfig

CPU = torch.device("cpu")
COMPILED_WIDTH = 512
COMPILED = (Block, ResBlock, FinalLayer, TimeEmbedding)


def open_session(bundle: Bundle, label: str, *, device: str, threads: int) -> Session:
    """Session that runs graph `label` of `bundle` in PyTorch."""
    limit_torch_threads(threads)
    where = torch_device(device)
    if where.type == "cuda":
        # Float32 means float32: convolutions would round their operands to TF32.
        torch.backends.cudnn.allow_tf32 = False
    try:
        if label == "decoder":
            return TorchSession(bundle.graph(label).spec, decoder_module(bundle), where)
        module, spec = _graph(bundle, label, where)
        return TorchSession(spec, module, where, _compiled(module, where))
    except torch.cuda.OutOfMemoryError as error:
        raise CspdError(
            f"{bundle.folder}: no room for {label} on the GPU: {str(error).splitlines()[0]}"
        ) from None
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise BundleError(
            f"{bundle.folder}: weights and settings of {label} do not fit together "
            f"({type(error).__name__}: {error}); rebuild it with cspd-export build"
        ) from error


def graph_module(bundle: Bundle, label: str) -> nn.Module:
    """The module behind a graph such as "target/backbone", on the CPU."""
    return _graph(bundle, label, CPU)[0]


def _graph(bundle: Bundle, label: str, device: torch.device) -> tuple[nn.Module, GraphSpec]:
    """Module and contract of a graph of a model; the bundle need not hold it."""
    role, _, name = label.partition("/")
    record = bundle.manifest.models[role]  # type: ignore[index]
    config = MarConfig(**record.config)
    model = _load_mar(str(bundle.file(record.weights)), config, record.precision, device)
    exact: DiffusionLoss | None = None
    if record.first_weights is not None:
        one_precision = device.type == "cuda" and name != FIRST
        first = str(bundle.file(record.first_weights))
        exact = model.diffloss if one_precision else _load_head(first, config, device)
    batch = record.graphs["backbone"].spec.axes["batch"].max
    rows = record.graphs["denoiser"].spec.axes["rows"].max
    graphs = model_graphs(model, batch, rows, record.precision, exact, hoisted=True)
    module, spec = graphs[name]
    return module, record.graphs[name].spec if name in record.graphs else spec


def decoder_module(bundle: Bundle) -> nn.Module:
    """The module behind the decoder graph."""
    manifest = bundle.manifest
    if manifest.decoder_weights is None:
        return PixelDecoder(manifest.geometry.image_size // manifest.geometry.grid)
    return assemble_vae(
        load_file(bundle.file(manifest.decoder_weights)), manifest.decoder_precision
    )


def _compiled(module: nn.Module, device: torch.device) -> tuple[str, ...]:
    """Compile `module` where that pays; what there is to say of it.

    On a GPU, for heads of a published size: small ones are done before they are compiled.
    TORCHDYNAMO_DISABLE=1, PyTorch's own switch, keeps everything as it is.
    """
    widths = (m.input_proj.out_features for m in module.modules() if isinstance(m, DiffusionHead))
    if device.type != "cuda" or max(widths, default=0) < COMPILED_WIDTH:
        return ()
    refusal = _compiler_refusal()
    if refusal is None:
        compile_blocks(module)
        return ()
    return (f"PyTorch compiles nothing here, which makes it slower: {refusal}",)


@lru_cache
def _compiler_refusal() -> str | None:
    """Why PyTorch cannot compile for the GPU; None if it can."""
    try:
        torch.compile(torch.nn.functional.silu, dynamic=True)(torch.ones(8, device="cuda"))
    except Exception as error:  # whatever a compiler of three libraries raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Let PyTorch compile the blocks of a network, once for all of a kind and for any sizes.

    Not whole networks: forty equal blocks would be compiled forty times over, for every shape. Nor
    the arithmetic of rounds: PyTorch 2.11 makes a kernel of it that Triton 3.6 refuses. What cannot
    be compiled runs as it is, with a warning of PyTorch's.
    """
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for part in module.modules():
        if isinstance(part, COMPILED) and part._compiled_call_impl is None:
            part.compile(dynamic=True, backend=backend)


# One model and one head in memory for all graphs that share them. By device: a module that is moved
# leaves the sessions that have it on another.
@lru_cache(maxsize=2)
def _load_mar(weights: str, config: MarConfig, precision: str, device: torch.device) -> Mar:
    return assemble_mar(config, load_file(weights), precision).to(device)


@lru_cache(maxsize=2)
def _load_head(weights: str, config: MarConfig, device: torch.device) -> DiffusionLoss:
    """The head in float32, of a model in reduced precision."""
    head = DiffusionLoss(config)
    head.load_state_dict({n.removeprefix("diffloss."): t for n, t in load_file(weights).items()})
    return head.eval().requires_grad_(False).to(device)
