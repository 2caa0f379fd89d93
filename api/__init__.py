"""Images by continuous speculative decoding: `cspd.load` opens a bundle, calling it makes images.

Everything here is imported when it is first used, so that `import cspd` costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cspd.engines.errors import CspdError
    from cspd.runtime.api import Pipeline, load
    from cspd.runtime.result import Images

    __version__: str

__all__ = ["CspdError", "Images", "Pipeline", "__version__", "load"]

_HOMES = {
    "CspdError": "cspd.engines.errors",
    "Images": "cspd.runtime.result",
    "Pipeline": "cspd.runtime.api",
    "load": "cspd.runtime.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("cspd")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cspd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
