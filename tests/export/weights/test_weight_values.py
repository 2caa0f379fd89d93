"""No number that is not finite gets into a bundle, from a file or from Python."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_pair import tiny_plan
from weights import decoder_zeros, draft_state, error_of

from cspd.export.build import BuildOptions, Source, build_bundle
from cspd.export.weights.checkpoint import load_mar, load_vae
from cspd.export.weights.values import check_values

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "row", "value"),
    [("class_emb.weight", 7, NAN), ("z_proj.bias", 95, INF), ("mask_token", 0, -INF),
     ("encoder_blocks.0.attn.qkv.weight", 5, NAN)],
)  # fmt: skip
def test_tensor_and_row_are_named(tmp_path, suffix, name, row, value):
    state = {key: tensor.clone() for key, tensor in draft_state().items()}
    state[name][row].view(-1)[-1] = value
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model_ema": state}, path)
    message = error_of(lambda: load_mar(path, "fashion-draft"))
    shape = list(state[name].shape)
    assert f"{path}: {name} {shape} holds {value} in row {row} of {shape[0]}" in message
    assert "get another" in message


def test_vae_is_looked_at_too(tmp_path):
    state = decoder_zeros()
    state["decoder.conv_out.bias"] = torch.tensor([0.0, NAN, INF])
    torch.save({"model": state}, tmp_path / "kl16.ckpt")
    message = error_of(lambda: load_vae(tmp_path / "kl16.ckpt"))
    assert "decoder.conv_out.bias [3] holds nan in row 1 and in 1 more of 3" in message


UNFIT = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", UNFIT)
def test_quantised_weights_are_refused_with_the_reason(tmp_path, dtype):
    state = dict(draft_state())
    state["z_proj.weight"] = torch.zeros(state["z_proj.weight"].shape, dtype=dtype)
    save_file(state, tmp_path / "w.safetensors")
    message = error_of(lambda: load_mar(tmp_path / "w.safetensors"))
    assert f"z_proj.weight is {str(dtype).removeprefix('torch.')}, a quantised format" in message
    assert "expected float32, bfloat16, float16 or float64" in message


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)], layout=layout)


NOT_DENSE = {
    "nested": lambda: nested(torch.strided),
    "nested, jagged": lambda: nested(torch.jagged),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "sparse_coo": lambda: torch.eye(3).to_sparse(),
    "strided on meta": lambda: torch.zeros(3, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch, on making such tensors
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("name", ["diffusion_pos_embed_learned", "z_proj.bias"])
def test_a_tensor_that_is_not_dense_is_refused_before_its_shape_is_asked_for(tmp_path, name, kind):
    state = {**draft_state(), name: NOT_DENSE[kind]()}
    torch.save({"model_ema": state}, tmp_path / "w.pth")
    message = error_of(lambda: load_mar(tmp_path / "w.pth"))
    assert f"w.pth: {name} is {kind.partition(',')[0]}, no dense tensor" in message
    assert "save it as one" in message


UNREADABLE = {
    "float8": (lambda: torch.zeros(3).to(torch.float8_e4m3fn), "a format such as float8"),
    "uint16": (lambda: torch.zeros(3, dtype=torch.uint16), "a format such as float8 or uint16"),
    "nested": (lambda: nested(torch.strided), "a nested tensor"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_the_old_format_cannot_give_back_is_not_called_damaged(tmp_path, kind):
    make, reason = UNREADABLE[kind]
    path = tmp_path / "w.pth"
    torch.save({**draft_state(), "w": make()}, path, _use_new_zipfile_serialization=False)
    message = error_of(lambda: load_mar(path))
    assert f"{path}: holds" in message and reason in message
    assert "damaged" not in message and "download" not in message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_tensors_of_the_decoder_and_given_in_python(tmp_path):
    state = {**decoder_zeros(), "decoder.conv_out.bias": nested(torch.strided)}
    torch.save({"model": state}, tmp_path / "kl16.ckpt")
    for load in (lambda: load_vae(tmp_path / "kl16.ckpt"), lambda: check_values(state, "decoder")):
        assert "decoder.conv_out.bias is nested, no dense tensor" in error_of(load)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_width_of_floats(dtype):
    good = torch.full((3, 40_000), 60_000.0 if dtype == torch.float16 else 3e38, dtype=dtype)
    check_values({"w": good}, "file")  # their sum is infinite, each of them is finite
    bad = good.clone()
    bad[1, 2] = -INF
    assert "w [3, 40000] holds -inf in row 1 of 3" in error_of(lambda: check_values({"w": bad}, ""))


def test_float64_beyond_float32():
    state = {"w": torch.tensor([1.0, 1e300], dtype=torch.float64)}
    assert "holds inf in row 1" in error_of(lambda: check_values(state, "file"))


def test_shapes_without_rows():
    state = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0)}
    check_values(state | {"repeated": torch.zeros(1, 1).expand(2**40, 2)}, "file")
    scalar, repeated = torch.tensor(NAN), torch.tensor([[0.0, NAN]]).expand(9, 2)
    for tensor, place in ((scalar, "[] holds nan in row 0 of 1"),
                          (repeated, "[9, 2] holds nan in row 0 and in 8 more of 9")):  # fmt: skip
        assert place in error_of(lambda tensor=tensor: check_values({"w": tensor}, "file"))


def broken(row: int, value: float) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in tiny_plan().models["draft"].weights().items()}
    state["z_proj.weight"][row, 0] = value
    return state


def test_weights_given_in_python_are_looked_at_before_anything_is_built(tmp_path):
    plan = tiny_plan()
    draft = replace(plan.models["draft"], state=broken(3, NAN))
    plan = replace(plan, models={**plan.models, "draft": draft})
    message = error_of(lambda: build_bundle(plan, tmp_path / "bundle"))
    assert "draft tiny-draft: z_proj.weight [32, 16] holds nan in row 3 of 32" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "options"),
    [(NAN, BuildOptions()), (1e5, BuildOptions(precision="fp16")),
     (1e5, BuildOptions(storage="fp16"))],
)  # fmt: skip
def test_weights_are_looked_at_again_as_they_are_written(tmp_path, value, options):
    """What a function makes, and what is finite in float32 but not in the number format asked."""
    plan = tiny_plan()
    given = broken(3, value)
    source = replace(plan.models["target"], state=(lambda: given) if value != value else given)
    plan = replace(plan, models={"target": source}, options=options)
    message = error_of(lambda: build_bundle(plan, tmp_path / "bundle"))
    assert f"target: z_proj.weight [32, 16] holds {'nan' if value != value else 'inf'}" in message
    assert ("float16 ends at 65,504" in message) == (value == 1e5)
    assert "--precision" in message and not (tmp_path / "bundle").exists()


def test_decoder_given_in_python(tmp_path):
    state = decoder_zeros() | {"post_quant_conv.bias": torch.full((16,), INF)}
    plan = replace(tiny_plan(), decoder=Source("kl16", state, "model"))
    message = error_of(lambda: build_bundle(plan, tmp_path / "bundle"))
    assert "decoder kl16: post_quant_conv.bias [16] holds inf in row 0 and in 15 more" in message
