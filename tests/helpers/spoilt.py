"""Bundles that are self-consistent, hashes included, and still cannot make images."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from cspd.engines.bundle import MANIFEST, hash_file
from cspd.runtime.settings import shipped_bundle


def shipped_copy(folder: Path) -> Path:
    """A copy of the shipped pair."""
    shutil.copytree(shipped_bundle(), folder / "bundle")
    return folder / "bundle"


def poison(bundle: Path, name: str) -> str:
    """Put a NaN into row 3 of a matrix of the weights `name`, and their new hash in the manifest.

    Returns the name of the matrix.
    """
    state = load_file(bundle / name)
    tensor = next(key for key, value in sorted(state.items()) if value.ndim == 2)
    state[tensor][3, 0] = float("nan")
    save_file(state, bundle / name)
    change_manifest(
        bundle, lambda m: m["files"].update({name: hash_file(bundle / name).model_dump()})
    )
    return tensor


def change_manifest(bundle: Path, change) -> None:
    """Apply `change` to the manifest as parsed JSON."""
    content = json.loads((bundle / MANIFEST).read_text())
    change(content)
    (bundle / MANIFEST).write_text(json.dumps(content))
