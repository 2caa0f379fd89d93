"""Command lines nobody would type: exit code 0, 1 or 2, one line of error, no trace."""

import os
from unittest import mock

from harness import budget, check, run_case, run_command, run_here
from hypothesis import example, given
from hypothesis import strategies as st

from cspd.export.cli import main as export_main
from cspd.runtime.commands.cli import main, shipped_bundle
from cspd.runtime.commands.options import SAMPLING

# What a shell can hand over: no NUL, bytes that are no UTF-8 as surrogates.
TEXT = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.binary(max_size=8).map(lambda raw: os.fsdecode(raw.replace(b"\0", b""))),
    st.sampled_from([
        "", " ", "-", "--", "nan", "inf", "-inf", "1e999", "1e-999", "0x10",
        "1_000", "٣", "²", "-1",
        "0", "1", "2", "3", "99999999999999999999", "9" * 5000, "1.5", "true", "None", "\n", "a\nb",
        "\x1b[31m", "[/red]", "../../etc/passwd", "/etc/passwd", "/dev/null", "~", "x" * 300, "%s",
        "207,360", "sneaker", "SNEAKER,bag", ",", ",,,", "-1,3", "1" * 9, "sneakr" * 2000,
    ]),
)  # fmt: skip
SMALL = ["--num-images", "1", "--num-iter", "2", "--head-steps", "2", "--batch-size", "1",
         "--threads", "1", "--quiet"]  # fmt: skip
OPTIONS = {
    param.opts[0]: param
    for option in SAMPLING
    for param in [option(lambda: None).__click_params__[0]]
}
# More images, steps or threads than these are honest work and honest waiting.
LIMITED = {
    "--num-images": ["0", "-1", "2", "4294967297", "9" * 40],
    "--num-iter": ["0", "-1", "1", "50", "9" * 40],
    "--head-steps": ["1", "-1", "3", "952", "9" * 40],
    "--batch-size": ["0", "-1", "2", "99999", "9" * 40],
    "--window": ["0", "-1", "3", "65", "9" * 40],
    "--threads": ["-1", "0", "2", "1025", "9" * 40],
}


@st.composite
def generate_arguments(draw) -> list[str]:
    """`cspd-run generate` on small work, some options replaced by odd values."""
    arguments = list(SMALL)
    names = [*OPTIONS, "--labels", "--device", "--threads"]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        if name in ("--align", "--reproducible"):
            arguments.append(draw(st.sampled_from([name, "--no" + name[1:], name + "=x"])))
            continue
        odd = st.sampled_from(LIMITED[name]) if name in LIMITED else TEXT
        sound = getattr(OPTIONS.get(name), "type", None)
        choices = list(getattr(sound, "choices", ())) or ["1"]
        arguments += [name, draw(st.one_of(odd, st.sampled_from(choices)))]
    return arguments + draw(
        st.lists(st.sampled_from(["--json", "--baseline", "--overwrite"]), max_size=2)
    )


@budget(full=60, ci=10)
@given(arguments=generate_arguments())
@example(arguments=[*SMALL, "--threads", "9" * 40])
@example(arguments=[*SMALL, "--num-images", "4294967296", "--labels", "99"])
@example(arguments=[*SMALL, "--labels", "sneakr" * 20_000])
@example(arguments=[*SMALL, "--labels", "1," * 20_000 + "1"])
@example(arguments=[*SMALL, "--seed", "9" * 5000])
@example(arguments=[*SMALL, "--batch-size", "9" * 12])
@example(arguments=[*SMALL, "--method", "auto"])
def test_generate_options(arena, arguments):
    folder = arena.fresh()
    call = run_command(main, ["generate", *arguments, "--out", str(folder / "out")])
    # Measured costs of `--method auto` are kept in the user's cache: here, one inside the folder.
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        check(run_case("command line: generate", call, folder))


@budget(full=40, ci=8)
@given(out=TEXT, bundle=TEXT)
@example(out="x" * 300, bundle="x" * 5000)
@example(out=os.fsdecode(b"\xff"), bundle="")
def test_generate_paths(arena, out, bundle):
    """Everything is relative to the folder of the case, and stays in it unless told otherwise."""
    folder = arena.fresh()
    out = out.replace("/", "_").replace("..", "_")
    arguments = ["generate", "--out", str(folder / out), *SMALL]
    source = str(folder / bundle.replace("/", "_")) if bundle else str(shipped_bundle())

    def call():
        os.chdir(folder)
        run_command(main, [*arguments, "--", source])()

    check(run_case("command line: paths", call, folder))


BUILD = {
    "--target": st.sampled_from(["mar-b", "mar-h", "mar-x", ""]),
    "--draft": st.sampled_from(["mar-b", "mar-h", "mar-x", ""]),
    "--precision": st.one_of(st.sampled_from(["fp32", "fp16", "bf16"]), TEXT),
    "--backend": st.one_of(st.sampled_from(["onnxruntime", "tensorrt", "tensorrt-rtx"]), TEXT),
    "--compute-capability": st.one_of(st.sampled_from(["8.9", "8.9.1", "99.0"]), TEXT),
    **{
        name: TEXT
        for name in ("--max-batch", "--max-rows", "--clip-timesteps", "--workspace", "--opt-level",
                     "--timing-cache", "--target-weights", "--draft-weights", "--vae")
    },
}  # fmt: skip


@st.composite
def build_arguments(draw) -> list[str]:
    """`cspd-export build` without `--random-weights`: no weights are there, so none is built."""
    names = draw(st.lists(st.sampled_from(list(BUILD)), max_size=4))
    flags = ["--allow-non-ema", "--version-compatible", "--hardware-compatible", "--overwrite"]
    arguments = ["--target", "mar-b"]
    for name in names:
        arguments += [name, draw(BUILD[name])]
    return arguments + draw(st.lists(st.sampled_from(flags), max_size=2))


@budget(full=700, ci=12)
@given(arguments=build_arguments())
@example(arguments=["--target", "mar-b", "--workspace", "9" * 400])
@example(arguments=["--target", "mar-b", "--target-weights", "x" * 5000])
@example(arguments=["--target", "mar-b", "--target-weights", "a\nb"])
@example(arguments=["--target", "mar-b", "--clip-timesteps", "sneakr" * 2000])
def test_build_options(arena, arguments):
    folder = arena.fresh()

    def call():
        os.chdir(folder)
        run_command(export_main, ["build", *arguments, "--out", "bundle"])()

    assert check(run_here("command line: build", call, folder)).kind == "refused"


@budget(full=200, ci=8)
@given(
    verb=st.sampled_from(["inspect", "lint", "triton", "demo-pair", "parity", "bulid"]), value=TEXT,
    flags=st.lists(st.sampled_from(["--json", "--no-verify", "--flavour", "--device", "-h"]),
                   max_size=2),
)  # fmt: skip
@example(verb="inspect", value="x" * 5000, flags=[])
@example(verb="demo-pair", value="x" * 5000, flags=[])
@example(verb="lint", value="/dev/null", flags=[])
def test_other_verbs(arena, verb, value, flags):
    folder = arena.fresh()

    def call():
        os.chdir(folder)
        outputs = [] if verb in ("inspect", "lint") else ["--out", "out"]
        run_command(export_main, [verb, *flags, *outputs, "--", value])()

    check(run_here("command line: other verbs", call, folder))
