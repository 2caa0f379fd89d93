"""What a setting is called in tables: its method and every option that is not the usual one."""

from __future__ import annotations

from typing import Any

from cspd.runtime.config import AS_RELEASED, RunConfig

# They say which images are made and how many, not how.
NOT_SETTINGS = ("labels", "num_images", "seed")
ALWAYS_NAMED = ("method", "num_iter", "gamma")


def setting_name(config: RunConfig, usual: RunConfig, ignored: tuple[str, ...] = ()) -> str:
    """Method, steps, gamma of `cspd`, and every option that differs from `usual`.

    `ignored` options are left out, for tables that have a column for them. Two configurations of
    one name differ at most in labels, seed, number of images and what is ignored.
    """
    values, standard = config.model_dump(), usual.model_dump()
    parts: list[str] = [config.method]
    parts += [f"{config.num_iter} steps"] if "num_iter" not in ignored else []
    if "gamma" not in ignored and (config.method == "cspd" or config.gamma != usual.gamma):
        parts += [f"gamma {config.gamma}"]
    released = all(values[name] == value for name, value in AS_RELEASED.items())
    parts += ["as released"] if released else []
    hidden = (*NOT_SETTINGS, *ALWAYS_NAMED, *ignored, *(AS_RELEASED if released else ()))
    parts += [
        f"{name.replace('_', '-')} {_shown(value)}"
        for name, value in values.items()
        if name not in hidden and value != standard[name]
    ]
    return ", ".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
