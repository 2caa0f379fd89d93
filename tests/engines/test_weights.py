"""Weights that are not finite are refused with their file, tensor and row, whatever the hash."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from spoilt import poison, shipped_copy

import cspd
from cspd.engines import weights
from cspd.engines.bundle import open_bundle
from cspd.engines.errors import BundleError
from cspd.engines.weights import check_weights_file, not_finite
from cspd.export.cli import main as export
from cspd.runtime.commands.cli import main as run

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """A piece ends within a row."""
    monkeypatch.setattr(weights, "PIECE", 5)


def spoilt(shape, dtype, *places, value=NAN):
    tensor = torch.ones(shape, dtype=dtype)
    for place in places:
        tensor[place] = value
    return tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_file_tensor_and_row_are_named(tmp_path, dtype, value):
    for row in range(6):
        bad = spoilt((6, 3), dtype, (row, 2), value=value)
        save_file({"good": torch.ones(9, dtype=dtype), "bad": bad}, tmp_path / "w.safetensors")
        with pytest.raises(BundleError) as caught:
            check_weights_file(tmp_path / "w.safetensors")
        expected = f"w.safetensors: bad [6, 3] holds {value} in row {row} of 6"
        assert expected in str(caught.value)
        assert "cspd-export build from a healthy checkpoint" in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_pass(tmp_path, dtype):
    most = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    state = {
        "most": torch.tensor([[most, most], [-most, -most]] * 4, dtype=dtype),
        "scalar": torch.tensor(1.0, dtype=dtype), "empty": torch.ones((0, 3), dtype=dtype),
        "positions": torch.arange(7),
    }  # fmt: skip
    save_file(state, tmp_path / "w.safetensors")
    check_weights_file(tmp_path / "w.safetensors")


def test_rows_are_counted_across_pieces():
    """Row 2 is numbers 8..11: it begins in one piece of five and ends in the next."""
    every = spoilt((4, 4), torch.float32, (2, 0), (2, 3), (3, 1))
    assert not_finite(every) == "[4, 4] holds nan in row 2 and in 1 more of 4"
    assert not_finite(torch.full((7,), INF)) == "[7] holds inf in row 0 and in 6 more of 7"
    assert not_finite(torch.tensor(NAN)) == "[] holds nan in row 0 of 1"
    assert "holds inf in row 0 of 1" in not_finite(torch.tensor([1e300], dtype=torch.float64))


def test_other_layouts_are_looked_at_whole():
    transposed = spoilt((3, 4), torch.float32, (2, 1)).T
    assert not_finite(transposed) == "[4, 3] holds nan in row 1 of 4"
    assert not_finite(torch.ones(3, 4).T) == not_finite(torch.ones(1).expand(10**12)) == ""


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "w").write_bytes(b"weights of somebody")
    with pytest.raises(BundleError, match=r"w: not a file of safetensors: .*rebuild the bundle"):
        check_weights_file(tmp_path / "w")


WEIGHTS = "target/weights.safetensors"


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A copy of the shipped pair, and how the NaN in it has to be named."""
    bundle = shipped_copy(tmp_path_factory.mktemp("poisoned"))
    tensor = poison(bundle, WEIGHTS)
    return bundle, f"{bundle / WEIGHTS}: {tensor} "


def test_a_bundle_never_hands_them_out(poisoned):
    bundle, named = poisoned
    for use in (lambda b: b.file(WEIGHTS), lambda b: b.graph_file("target/denoiser")):
        with pytest.raises(BundleError) as caught:
            use(open_bundle(bundle))
        assert named in str(caught.value) and "in row 3 of" in str(caught.value)
    open_bundle(bundle).graph_file("draft/denoiser")


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_no_entry_makes_images_of_them(poisoned, tmp_path, monkeypatch, backend):
    monkeypatch.chdir(tmp_path)
    bundle, named = poisoned
    generate = ["generate", str(bundle), "--num-iter", "2", "--backend", backend]
    for command, words in ((export, ["inspect", str(bundle)]), (run, generate)):
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 1 and f"Error: {named}" in result.output
    with pytest.raises(BundleError) as caught:
        cspd.load(bundle, backend=backend)(0, num_iter=2)
    assert str(caught.value).startswith(named)
