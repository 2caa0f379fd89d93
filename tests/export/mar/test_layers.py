"""What a GPU computes in other operations than those that are exported: the same."""

import pytest
import torch

from cspd.export.graphs.networks import model_graphs
from cspd.export.mar.layers import Attention, Linear, fused_attention
from cspd.export.mar.model import MASKED_LOGIT, Mar
from cspd.export.mar.presets import MarConfig
from cspd.export.torch_session import compile_blocks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padded", [0, 3])
def test_fused_attention_is_attention(dtype, padded):
    torch.manual_seed(1)
    layer = Attention(64, 4).requires_grad_(False)
    for part in layer.modules():
        if isinstance(part, Linear):
            part.to(dtype)
    query, key, value = (torch.randn(2, 4, n, 16) for n in (5, 9, 9))
    hidden = torch.arange(9) >= 9 - padded
    bias = (hidden.float() * MASKED_LOGIT)[None, None, None].expand(2, 1, 1, 9)
    expected = layer._attend(query, key, value, bias if padded else None)
    halves = (part.to(dtype) for part in (query, key, value))
    mixed = fused_attention(*halves, bias if padded else None)
    found = layer.proj(mixed.transpose(1, 2).flatten(2))
    units = 20 * torch.finfo(dtype).eps
    assert float((found - expected).norm() / expected.norm()) < units


def test_compiled_blocks_compute_the_same_for_any_sizes():
    config = MarConfig(4, 48, 2, 2, 4, head_width=64, head_depth=2, num_classes=10, buffer_size=4)
    torch.manual_seed(1)
    graphs = model_graphs(Mar(config).eval().requires_grad_(False), 4, 64, hoisted=True)
    cases = [
        ("backbone", {"batch": 2, "visible": 4, "positions": 2}),
        ("backbone", {"batch": 4, "visible": 8, "positions": 2}),
        ("denoiser_hoisted", {"rows": 4, "tokens": 4}),
        ("denoiser_hoisted", {"rows": 16, "tokens": 4}),
        ("head_modulation", {"tokens": 2}),
    ]

    def results():
        for name, sizes in cases:
            module, spec = graphs[name]
            inputs = spec.example_inputs({**spec.sizes("opt"), **sizes}, seed=1)
            with torch.inference_mode():
                outputs = module(*(inputs[tensor.name] for tensor in spec.inputs))
            yield from outputs if isinstance(outputs, tuple) else (outputs,)

    expected = list(results())
    compile_blocks(graphs["backbone"][0], "aot_eager")  # traced; making kernels takes minutes
    torch._dynamo.utils.counters.clear()
    for found, value in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
