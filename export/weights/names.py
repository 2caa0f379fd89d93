"""Which tensors of a file are the network's, under the network's own names, and whether averaged.

Training code stores a state dict inside others ("model_ema", "state_dict", ...), and wrappers put a
prefix before every name ("module.", "_orig_mod.", ...). Averaged weights come first, whichever way
they are named; a label that says otherwise is passed on, so that the caller can refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.export.weights.files import WeightFile, few

AVERAGED = (
    "model_ema", "ema_model", "ema", "ema_state_dict", "state_dict_ema", "model_ema_state_dict",
)  # fmt: skip
PLAIN = ("model", "state_dict", "model_state_dict", "module")
# Prefixes that mark averaged weights, also among others; and those that wrap a whole state dict:
# of DistributedDataParallel, torch.compile, and a module that holds the network as `model`.
AVERAGED_PREFIXES = ("model_ema.", "ema_model.", "ema.")
WRAPPERS = ("module.", "_orig_mod.", "model.")
UNIFORM = (*WRAPPERS, *AVERAGED_PREFIXES)
# What averaging writes beside the weights (torch.optim.swa_utils, ema_pytorch, latent diffusion).
COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step")
MAX_LAYERS = 6  # of prefixes; two or three are seen
MAX_REPEATED = 1 << 30  # bytes of tensors that a smaller file may stand for, by strides of 0


@dataclass(frozen=True)
class NamedWeights:
    """Tensors by the network's names.

    `source` is where they were: the name of their dict, or "safetensors" or "state_dict" for a bare
    one, and after a slash the prefix taken off. `averaged` is None where neither says so.
    """

    state: dict[str, Tensor]
    source: str
    averaged: bool | None
    notes: tuple[str, ...]


def named_weights(file: WeightFile, parts: tuple[str, ...]) -> NamedWeights:
    """The state dict in `file`, without the prefixes of wrappers.

    `parts` are prefixes of the network's weights in files with other networks beside it. Raises
    CspdError if there is no state dict, or if only some names have a wrapper's prefix.
    """
    state, label = _state_dict(file)
    _check_size(state, file)
    bare, prefixes = _without_prefixes(state, parts)
    for wrapper in WRAPPERS:
        wrapped = [name for name in bare if name.startswith(wrapper)]
        if wrapped:
            others = [name for name in bare if not name.startswith(wrapper)]
            raise CspdError(
                f"{file.path}: {len(wrapped)} names start with '{wrapper}' ({few(wrapped)}), "
                f"{len(others)} do not ({few(others)}); save the state_dict of one network alone"
            )
    prefix = "".join(prefixes)
    source = label or ("safetensors" if file.form == "safetensors" else "state_dict")
    return NamedWeights(
        bare,
        f"{source}/{prefix}" if prefix else source,
        _is_averaged(label, prefixes),
        _notes(file, len(state) - len(bare), prefix),
    )


def _state_dict(file: WeightFile) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in `file`, averaged if there is one, and the name it has there."""
    content = file.content
    if isinstance(content, Mapping):
        for name in (*AVERAGED, *PLAIN):
            if not _unlike_state(content.get(name)):
                return dict(content[name]), name
        if not _unlike_state(content):
            return dict(content), None
    raise CspdError(
        f"{file.path}: {_without_state(content)}; save the averaged weights as "
        "{'model_ema': network.state_dict()}"
    )


def _without_state(content: Any) -> str:
    """What `content` holds in place of a state dict."""
    found: object = type(content).__name__
    if isinstance(content, Mapping):
        if unusable := unusable_dicts(content, (*AVERAGED, *PLAIN)):
            return f"{unusable}, expected tensors by name"
        if any(isinstance(value, Tensor) for value in content.values()):
            return f"{_unlike_state(content)}, expected tensors by name alone"
        found = [key if isinstance(key, str) else type(key).__name__ for key in content][:8]
    return f"found {found}, expected one of {[*AVERAGED, *PLAIN]} or tensors by name"


def unusable_dicts(content: Mapping[Any, Any], names: Iterable[str]) -> str:
    """Those of `names` that are in `content` and no state dict, and why; empty without any."""
    found = [(name, _unlike_state(content[name])) for name in names if name in content]
    return ", ".join(f"its '{name}' {problem}" for name, problem in found if problem)


def _unlike_state(value: Any) -> str:
    """Why `value` is no state dict; empty if it is one."""
    if not isinstance(value, Mapping):
        return f"is {type(value).__name__}"
    for name, tensor in value.items():
        if not isinstance(name, str):
            return f"has a name that is no text but {type(name).__name__} ({name!r:.60})"
        if not isinstance(tensor, Tensor):
            return f"holds {name!r:.60}, which is {type(tensor).__name__}"
    return "" if value else "is empty"


def _check_size(state: Mapping[str, Tensor], file: WeightFile) -> None:
    """Raise CspdError if tensors repeat what the file holds until they fill the memory."""
    declared = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    size = file.size()
    if declared > max(size, MAX_REPEATED):
        raise CspdError(
            f"{file.path}: declares {declared:,} bytes of tensors in a file of {size:,}; "
            "get the file from its authors"
        )


def _without_prefixes(
    state: dict[str, Tensor], parts: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`state` without what wraps all its names, or only the part of it that is meant."""
    taken: list[str] = []
    while len(taken) < MAX_LAYERS:
        state = {n: t for n, t in state.items() if n not in COUNTERS or t.numel() != 1}
        found = [part for part in parts if any(name.startswith(part) for name in state)]
        found += [w for w in UNIFORM if state and all(name.startswith(w) for name in state)]
        if not found:
            break
        taken.append(found[0])
        state = {n.removeprefix(found[0]): t for n, t in state.items() if n.startswith(found[0])}
    return state, tuple(taken)


def _is_averaged(label: str | None, prefixes: tuple[str, ...]) -> bool | None:
    """What the name of the dict and the prefixes say; any wrapping of an average is one."""
    if label in AVERAGED or set(prefixes) & set(AVERAGED_PREFIXES):
        return True
    return False if label in PLAIN or "model." in prefixes else None


def _notes(file: WeightFile, unused: int, prefix: str) -> tuple[str, ...]:
    if not prefix:
        return ()
    left = f"; {unused} other tensors are not used" if unused else ""
    return (f"{file.path.name}: names taken without '{prefix}'{left}",)
