import json
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from golden_vae import GOLDEN, golden_weight, relative
from safetensors.torch import load_file

from cspd.export.mar.vae import VaeDecoder

KEYS = json.loads((GOLDEN / "kl16_decoder.json").read_text())["keys"]


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "kl16_decoder.vectors.safetensors")


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    with torch.device("meta"):
        module = VaeDecoder()
    state = {name: golden_weight(i, name, shape) for i, (name, shape) in enumerate(KEYS)}
    module.load_state_dict(state, assign=True)
    return module.eval()


@pytest.fixture(scope="module")
def onnx_path(decoder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "model.onnx"
    torch.onnx.export(
        decoder,
        (torch.zeros(2, 16, 4, 4),),
        path,
        input_names=["latents"],
        output_names=["images"],
        dynamic_shapes={"latents": {0: "batch"}},
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    return path


def test_names_and_shapes_are_the_authors():
    with torch.device("meta"):
        state = VaeDecoder().state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == dict(KEYS)


@torch.inference_mode()
def test_golden_images(decoder, vectors):
    image = decoder(vectors["latents"])
    assert image.shape == (2, 3, 64, 64)
    assert relative(image, vectors["image"]) < 1e-5


def test_onnx_runtime_gives_the_golden_images_at_any_batch(onnx_path, vectors):
    onnx.checker.check_model(str(onnx_path))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
    latents, image = vectors["latents"], vectors["image"]
    for rows in ([0, 1], [1], [1, 0, 1]):
        (result,) = session.run(None, {"latents": latents[rows].numpy()})
        assert relative(torch.from_numpy(result), image[rows]) < 1e-4


@torch.inference_mode()
def test_scale_is_applied_inside(decoder, vectors):
    unscaled = decoder.decoder(decoder.post_quant_conv(vectors["latents"][:1]))
    assert relative(unscaled, vectors["image"][:1]) > 0.1


@torch.inference_mode()
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_precision_follows_the_weights(decoder, vectors, dtype, tolerance):
    with torch.device("meta"):
        halved = VaeDecoder().to(dtype)
    halved.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in decoder.state_dict().items()}, assign=True
    )
    latents = vectors["latents"][:1, :, :1, :1]  # half-precision convolutions are slow on a CPU
    image = halved(latents)
    assert image.dtype == torch.float32
    assert 1e-5 < relative(image, decoder(latents)) < tolerance
