"""The settings of a run, validated once; what `run.json` and every image record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from cspd.engines.backends import BACKENDS
from cspd.engines.console.commands import SPEED, WHAT
from cspd.engines.errors import SettingError
from cspd.engines.manifest import Manifest, Role
from cspd.engines.spec import Record
from cspd.engines.words import nearest, setting
from cspd.runtime.about import GUIDED, OF_CSPD, OF_RESIDUAL, SPECULATIVE, About, idle
from cspd.runtime.bounds import expected
from cspd.runtime.contract import check_graphs
from cspd.runtime.heads.relax import total_variation
from cspd.runtime.heads.steps import HeadSteps

Method = Literal["target", "draft", "cspd", "lossless", "auto"]
HeadMode = Literal["plain", "lossless", "auto"]
MAX_SEED = 2**64 - 1
# `--as-released`: what the authors' runner does, but for its defects (docs/explanation/methods.md).
AS_RELEASED: Mapping[str, Any] = {
    "method": "cspd", "accept_temperature": 42.0, "residual_temperature": 1.0,
    "on_reject": "residual", "verify": "parallel", "align": True, "count_in": "steps",
}  # fmt: skip


class HeadChoice(Record):
    """The head of `role` speculates with `window` rows a token for up to `up_to` tokens.

    `table`: engines look modulations up in a table, while it fits into the memory for it.
    """

    role: Role
    window: int = Field(ge=1, le=64)
    up_to: int = Field(ge=0)
    table: bool = True


class RunConfig(Record):
    """Everything that decides which images a bundle makes.

    An option stands here and nowhere else: name, default, bounds, help, and what it needs to do
    anything. The command line and the checks are made of that.
    """

    method: Annotated[
        Method, About("Decoding method.", default="cspd; target, if the bundle has no draft")
    ] = "cspd"
    labels: tuple[int, ...] = Field(min_length=1)
    num_images: Annotated[int, About("Number of images.", WHAT, default="one per label")] = Field(
        ge=1, le=10_000_000
    )
    class_balanced: Annotated[
        bool, About("Labels in blocks of equal length, as the authors score, not cycled.", WHAT)
    ] = False
    seed: Annotated[int, About("Image k of a seed is always the same image.", WHAT)] = Field(
        0, ge=0, le=MAX_SEED
    )
    num_iter: Annotated[int, About("Autoregressive steps.")] = Field(64, ge=1)
    head_steps: Annotated[
        int | str, About('Denoising steps: "100", or "50:20", fewer and fewer (lossy).')
    ] = 100
    cfg: Annotated[float, About("Guidance scale; 1 is none.")] = Field(
        1.0, ge=0, le=100, allow_inf_nan=False
    )
    cfg_schedule: Annotated[
        Literal["linear", "constant"], About("Guidance over the steps.", needs=GUIDED)
    ] = "linear"
    temperature: Annotated[float, About("Factor on the noise of every denoising step.")] = Field(
        1.0, gt=0, le=10, allow_inf_nan=False
    )
    gamma: Annotated[int, About("cspd: tokens drafted per verification.", needs=OF_CSPD)] = Field(
        8, ge=1
    )
    prefill: Annotated[float, About("cspd: share of tokens from the target.", needs=OF_CSPD)] = (
        Field(0.05, ge=0, le=1)
    )
    accept_temperature: Annotated[
        float,
        About(
            "cspd: width of the acceptance test; 1 is the paper's formula, 42 the released code.",
            needs=OF_CSPD,
        ),
    ] = Field(42.0, gt=0, le=1000, allow_inf_nan=False)
    verify: Annotated[
        Literal["parallel", "prefix"],
        About(
            "cspd: judge a window at once (released code), or up to the first rejection (paper).",
            needs=OF_CSPD,
        ),
    ] = "parallel"
    align: Annotated[bool, About("cspd: share the noise.", needs=OF_CSPD)] = True
    on_reject: Annotated[
        Literal["target", "residual"],
        About("cspd: what replaces a rejected token.", needs=OF_CSPD),
    ] = "target"
    # That of the test makes both complementary, which nobody published, and adds its noise to the
    # token.
    residual_temperature: Annotated[
        float,
        About(
            "cspd --on-reject residual: width of the residual; 1 in the paper and the released "
            "code.",
            needs=OF_RESIDUAL,
        ),
    ] = Field(1.0, gt=0, le=1000, allow_inf_nan=False)
    count_in: Annotated[
        Literal["tokens", "steps"],
        About("cspd: what --gamma and --prefill count; steps in the released code.", needs=OF_CSPD),
    ] = "tokens"
    head: Annotated[
        HeadMode | None,
        About("Denoising: step by step, speculatively, or what is faster.", default="by --method"),
    ] = None
    window: Annotated[
        int | None,
        About(
            "lossless: denoising steps verified per call; 1 is stepping.",
            needs=SPECULATIVE,
            default="by measured costs",
        ),
    ] = Field(None, ge=1, le=64)
    relax: Annotated[
        str | None,
        About(
            'lossless, loosened: "tv=0.05" (approximate).',
            needs=SPECULATIVE,
            default="not loosened",
        ),
    ] = None
    # What was chosen for each model from measured costs. Without it, "auto" chooses.
    heads: tuple[HeadChoice, ...] = ()
    batch_size: Annotated[
        int,
        About("Images computed together.", SPEED, default="up to 8, evenly filled"),
    ] = Field(8, ge=1, le=4096)
    modulation_memory: Annotated[
        int,
        About(
            "MiB for what the head computes ahead of its steps; loops are cut to it, and engines "
            "compute it ahead if it fits and tune did not find that slower.",
            SPEED,
        ),
    ] = Field(512, ge=1, le=1 << 20)
    reproducible: Annotated[
        bool, About("Pad batches, so that an image never depends on its batch.", SPEED)
    ] = True
    backend: Annotated[str, About("What runs the networks.", SPEED, choices=tuple(BACKENDS))] = (
        "onnxruntime"
    )

    @model_validator(mode="after")
    def _check_balance(self) -> RunConfig:
        if self.class_balanced and self.num_images % len(self.labels):
            raise ValueError(
                f"{setting('class_balanced')}: {setting('num_images')} is {self.num_images}, "
                f"expected a multiple of the {len(self.labels)} classes"
            )
        return self

    @field_validator("head_steps", mode="before")
    @classmethod
    def _steps(cls, value: object) -> int | str:
        return HeadSteps.parse(value).value

    @field_validator("relax")
    @classmethod
    def _relax(cls, value: str | None) -> str | None:
        if value is not None:
            total_variation(value)
        return value

    @property
    def head_mode(self) -> HeadMode:
        """How the heads sample: "lossless" only with a window, or relaxed; else by costs."""
        own: dict[str, HeadMode] = {"lossless": "lossless", "auto": "auto"}
        mode = self.head or own.get(self.method, "plain")
        by_costs = mode == "lossless" and self.window is None and self.relax is None
        return "auto" if by_costs else mode

    def choice(self, role: Role) -> HeadChoice | None:
        """What was chosen for the head of `role`, if anything."""
        return next((choice for choice in self.heads if choice.role == role), None)

    def label_of(self, image: int) -> int:
        """Class of image number `image`: the labels cycled, or in blocks if `class_balanced`."""
        if self.class_balanced:
            return self.labels[image // (self.num_images // len(self.labels))]
        return self.labels[image % len(self.labels)]


def about(name: str) -> About | None:
    """What is told about setting `name`; None for those that are no option of their own."""
    found = (part for part in RunConfig.model_fields[name].metadata if isinstance(part, About))
    return next(found, None)


def make_config(**values: object) -> RunConfig:
    """A RunConfig from the values of settings; SettingError names the first that is wrong."""
    return valid_config(values)


def valid_config(values: Mapping[str, object], *, strict: bool = False) -> RunConfig:
    """As `make_config`; with `strict`, text is no number."""
    try:
        return RunConfig.model_validate(values, strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise SettingError(str(first["ctx"]["error"])) from None
        raise SettingError(_wrong(first)) from None


def _wrong(error: ErrorDetails) -> str:
    """What is wrong with one setting: its name, what it got, what it takes."""
    name, value = str(error["loc"][0]), error["input"]
    if name not in RunConfig.model_fields:
        advice = nearest(name, RunConfig.model_fields)
        hint = f"; did you mean {setting(advice)}?" if advice else ""
        return f"{setting(name)}: there is no such setting{hint}"
    if error["type"] == "missing":
        return f"{setting(name)} is missing"
    own = error.get("ctx", {}).get("error")
    wanted = str(own) if own else f"expected {expected(RunConfig, name, value)}"
    return f"{setting(name)} is {value!r:.60}, {wanted}"


def asked_config(asked: Mapping[str, Any], usual: Mapping[str, Any]) -> RunConfig:
    """The `usual` settings with what was `asked` for in their place.

    "as_released" stands for the settings of AS_RELEASED. Raises SettingError for an option that is
    wrong, that contradicts it, or that changes nothing for the method that was asked for.
    """
    options = {name: value for name, value in asked.items() if name != "as_released"}
    preset = AS_RELEASED if _switch("as_released", asked.get("as_released")) else {}
    config = make_config(**{**usual, **preset, **options})
    for name, value in preset.items():
        if getattr(config, name) != value:
            raise SettingError(
                f"{setting('as_released', True)} means {setting(name, value)}, asked for was "
                f"{setting(name, getattr(config, name))}; leave one of them out"
            )
    for name in options:
        told = about(name)
        if told is not None and (reason := idle(name, told, config)):
            raise SettingError(reason)
    return config


def _switch(name: str, value: object) -> bool:
    """A value that is on or off, from a flag or from text such as that of `evaluate --method`."""
    known = {None: False, False: False, True: True, "false": False, "true": True}
    if not isinstance(value, bool | str | None) or value not in known:
        raise SettingError(f"{setting(name)} is {value!r:.60}, expected true or false")
    return known[value]


def check_config(config: RunConfig, manifest: Manifest) -> None:
    """Raise SettingError unless the bundle can run `config`, BundleError if it can run nothing."""
    check_graphs(manifest)
    check_settings(config, manifest)


def check_settings(config: RunConfig, manifest: Manifest) -> None:
    """Raise SettingError unless `config` is within the bounds of the bundle."""
    geometry = manifest.geometry
    for label in config.labels:
        if not 0 <= label < geometry.num_classes:
            raise SettingError(
                f"{setting('labels')}: class {label}, expected 0..{geometry.num_classes - 1}"
            )
    limits = {"num_iter": config.num_iter}
    if config.method == "cspd":
        limits["gamma"] = config.gamma
    for name, value in limits.items():
        if value > geometry.num_tokens:
            raise SettingError(
                f"{setting(name)} is {value}, expected 1..{geometry.num_tokens}, "
                "the number of tokens of an image"
            )
    most = manifest.schedule.most_steps
    steps = HeadSteps.parse(config.head_steps)
    if max(steps.first, steps.last) > most:
        raise SettingError(
            f"{setting('head_steps')} is {config.head_steps}, expected 2..{most} for this model"
        )
    _check_heads(config)
    if config.method in ("draft", "cspd") and "draft" not in manifest.models:
        raise SettingError(
            f"{setting('method', config.method)}: the bundle has no draft model; build it with "
            f"cspd-export build --draft, or use {setting('method', 'target')} or "
            f"{setting('method', 'lossless')}"
        )


# A run may compute this many images of padding for each of its own, and this many in any case.
MOST_PADDING, LITTLE_PADDING = 16, 64


def computed_images(config: RunConfig, images: int) -> int:
    """How many images are computed to make `images`: batches are padded if `reproducible`."""
    return -(-images // config.batch_size) * config.batch_size if config.reproducible else images


def check_padding(config: RunConfig) -> None:
    """Raise SettingError for a batch that is far larger than the run and would be padded."""
    computed = computed_images(config, config.num_images)
    if computed > LITTLE_PADDING and computed > MOST_PADDING * config.num_images:
        raise SettingError(
            f"{setting('batch_size')} is {config.batch_size}, but the run makes "
            f"{config.num_images}: batches are padded, so {computed:,} images would be computed; "
            f"use {setting('batch_size', config.num_images)} or {setting('reproducible', False)}"
        )


def _check_heads(config: RunConfig) -> None:
    """Raise SettingError for options that contradict each other."""
    if config.method in ("lossless", "auto") and config.head not in (None, config.method):
        raise SettingError(
            f"{setting('head', config.head)} contradicts {setting('method', config.method)}; "
            f"use {setting('method', 'target')}"
        )


LABEL_SYNTAX = "numbers, ranges like 0-3 and names, with commas between them"


def parse_labels(text: str, class_names: tuple[str, ...]) -> tuple[int, ...]:
    """Class numbers from "207,360", "0-3" (both ends included) or "sneaker,bag".

    Raises SettingError that suggests the nearest name, or says how labels are written.
    """
    by_name = {name.lower(): index for index, name in reversed(list(enumerate(class_names)))}
    labels: list[int] = []
    for part in (piece.strip() for piece in text.split(",")):
        span = re.fullmatch(r"([0-9]{1,9}) *- *([0-9]{1,9})", part)
        if re.fullmatch(r"-?[0-9]{1,9}", part):
            labels.append(int(part))
        elif part.lower() in by_name:
            labels.append(by_name[part.lower()])
        elif span:
            labels += _span(int(span[1]), int(span[2]), len(class_names))
        else:
            near = nearest(part, by_name, cutoff=0.0)
            hint = f"; the nearest is {near!r}" if near else ""
            raise SettingError(
                f"{setting('labels')}: no class {part!r:.60}{hint}; expected {LABEL_SYNTAX}"
            )
    return tuple(labels)


def _span(first: int, last: int, num_classes: int) -> range:
    if not first <= last < num_classes:
        raise SettingError(
            f"{setting('labels')}: {first}-{last} is no range of classes; "
            f"expected ascending numbers within 0-{num_classes - 1}"
        )
    return range(first, last + 1)
