"""Engines that cannot run here are refused before the work, with the command that rebuilds them."""

import pytest
from click.testing import CliRunner

from cspd.engines.bundle import Bundle, open_bundle
from cspd.engines.console.preflight import problems
from cspd.engines.errors import CspdError
from cspd.engines.machine import check_engines, check_machine, machine_checks
from cspd.runtime.commands.cli import main
from cspd.runtime.settings import shipped_bundle

RTX = "tensorrt-rtx"


@pytest.fixture
def engines(hoisted_bundle):
    """A bundle with real engines, and the version and capabilities that its records name."""
    bundle = Bundle(hoisted_bundle.folder, hoisted_bundle.manifest.model_copy(deep=True))
    built = bundle.graph("target/backbone").engines[RTX]
    return bundle, built.version, built.compute_capabilities


def test_engines_for_this_gpu_pass(engines):
    bundle, version, capabilities = engines
    for capability in (None, *capabilities):
        check_engines(bundle, RTX, version, capability)


def test_engines_of_another_version_are_refused(engines):
    bundle, version, _ = engines
    said = f"built with {RTX} {version}, 9.9.9 is installed"
    with pytest.raises(CspdError, match=said) as found:
        check_engines(bundle, RTX, "9.9.9", None)
    assert f"cspd-export build --backend {RTX}" in str(found.value)


def test_engines_for_another_gpu_are_refused(engines):
    bundle, version, _ = engines
    backbone = bundle.graph("target/backbone")
    built = backbone.engines[RTX].model_copy(update={"compute_capabilities": ("8.9", "12.0")})
    backbone.engines[RTX] = built
    check_engines(bundle, RTX, version, "8.9")
    with pytest.raises(
        CspdError, match=r"for compute capability 8\.9, 12\.0, this GPU has 3\.5"
    ) as found:
        check_engines(bundle, RTX, version, "3.5")
    assert str(found.value).endswith("--compute-capability 3.5")


def test_the_pair_in_the_package_is_rebuilt_by_its_own_command():
    with pytest.raises(CspdError, match="build it with: cspd-export demo-pair --backend"):
        check_engines(open_bundle(shipped_bundle()), RTX, "1", None)


def test_a_bundle_without_engines_is_refused(tiny_bundle):
    with pytest.raises(CspdError, match="target/backbone has no tensorrt-rtx engine"):
        check_engines(tiny_bundle, RTX, "1", None)


def test_everything_that_is_missing_is_named(tiny_bundle):
    device, engine = problems(machine_checks(tiny_bundle, RTX, "cuda"))
    assert "sees no CUDA GPU" in device and "has no tensorrt-rtx engine" in engine
    with pytest.raises(CspdError, match="sees no CUDA GPU"):
        check_machine(tiny_bundle, RTX, "cuda")


@pytest.mark.parametrize(
    "verb",
    [("generate",), ("tune",), ("serve",),
     ("evaluate", "--num-images", "1000"), ("bench", "--images", "0")],
)  # fmt: skip
def test_every_verb_looks_at_the_machine_first(verb, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *options = verb
    result = CliRunner().invoke(main, [name, str(tiny_bundle.folder), *options, "--device", "cuda"])
    assert result.exit_code == 1 and "sees no CUDA GPU" in result.output, result.output
    assert list(tmp_path.iterdir()) == []
