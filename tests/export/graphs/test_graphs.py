"""Every exported graph through ONNX Runtime: authors' vectors, free axes, rows apart."""

import pytest
import torch
from golden_backbone import golden_case, transparent_schedule
from recorded import relative_error, vectors

from cspd.engines.backends import open_session
from cspd.engines.schedule import ScheduleSpec, make_schedule

TOLERANCE = 1e-4
VECTORS = vectors()


@pytest.fixture(scope="module")
def graph(tiny_bundle):
    """`graph(name)`: session of a graph of the target, or of the decoder, in ONNX Runtime."""

    def get(name, backend="onnxruntime"):
        label = name if name == "decoder" else f"target/{name}"
        if (label, backend) not in opened:
            opened[label, backend] = open_session(tiny_bundle, label, backend, threads=1)
        return opened[label, backend]

    opened = {}
    return get


def int32(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def check_sizes(graph, name: str, sizes: dict[str, int]) -> None:
    """The graph at these axis sizes equals the PyTorch module."""
    session, reference = graph(name), graph(name, "torch")
    inputs = session.spec.example_inputs(sizes, seed=1)
    if "schedule" in inputs:
        inputs["schedule"] = make_schedule(ScheduleSpec(clip_timesteps=950), sizes["steps"]).table
    got, expected = session(**inputs), reference(**inputs)
    for tensor in session.spec.outputs:
        value = got[tensor.name]
        assert value.shape == tensor.sizes(sizes), tensor.name
        assert relative_error(value, expected[tensor.name]) < tensor.tolerance, tensor.name


@pytest.mark.parametrize("count", [0, 5, 15])
def test_backbone_golden(graph, count):
    tokens, visible, z = golden_case(count)
    got = graph("backbone")(
        tokens=tokens, visible=visible, visible_len=int32([count] * 2), labels=int32([3, 417]),
        positions=torch.arange(16).int().repeat(2, 1),
    )  # fmt: skip
    assert relative_error(got["z"], z) < TOLERANCE


def test_backbone_golden_with_ragged_lengths(graph):
    few, many = golden_case(5), golden_case(15)
    visible = torch.full((2, 16), 9, dtype=torch.int32)
    visible[0, :5], visible[1, :15] = few[1][0], many[1][1]
    z = graph("backbone")(
        tokens=torch.stack([few[0][0], many[0][1]]), visible=visible, visible_len=int32([5, 15]),
        labels=int32([3, 417]), positions=torch.arange(16).int().repeat(2, 1),
    )["z"]  # fmt: skip
    assert relative_error(z[0], few[2][0]) < TOLERANCE
    assert relative_error(z[1], many[2][1]) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("visible", [0, 1, 15, 16])
@pytest.mark.parametrize("positions", [1, 16])
def test_backbone_axes_are_free(graph, batch, visible, positions):
    check_sizes(graph, "backbone", {"batch": batch, "visible": visible, "positions": positions})


def test_denoiser_golden(graph):
    index = int32(range(5))
    got = graph("denoiser")(
        x=VECTORS["denoiser.x"], step=index, token=index, conditions=VECTORS["denoiser.z"][None],
        guidance=torch.ones(5), schedule=transparent_schedule(VECTORS["denoiser.t"]),
    )  # fmt: skip
    noise, variance = VECTORS["denoiser.out"].split(16, dim=1)
    assert relative_error(got["mean"], noise) < TOLERANCE
    assert relative_error(2 * got["fraction"] - 1, variance) < TOLERANCE


def test_guided_denoiser_golden(graph, golden_settings):
    index = int32(range(5))
    got = graph("denoiser")(
        x=VECTORS["denoiser.x"], step=index, token=index,
        conditions=VECTORS["denoiser_cfg.z"].reshape(2, 5, 32),
        guidance=torch.full((5,), golden_settings["denoiser_cfg_scale"]),
        schedule=transparent_schedule(VECTORS["denoiser.t"]),
    )  # fmt: skip
    noise, variance = VECTORS["denoiser_cfg.out"][:5].split(16, dim=1)
    assert relative_error(got["mean"], noise) < TOLERANCE
    assert relative_error(2 * got["fraction"] - 1, variance) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("tokens", "steps"), [(1, 2), (2, 25), (7, 3)])
def test_denoiser_axes_are_free(graph, rows, branches, tokens, steps):
    sizes = {"rows": rows, "branches": branches, "tokens": tokens, "steps": steps}
    check_sizes(graph, "denoiser", sizes)


def test_denoiser_rows_at_different_steps_of_different_tokens(graph):
    """One call with six rows equals six calls with one row and one condition each."""
    session = graph("denoiser")
    generator = torch.Generator().manual_seed(0)
    steps, tokens = [24, 0, 3, 3, 11, 1], [2, 0, 2, 1, 0, 2]
    guidance = torch.linspace(1, 4, 6)
    x, conditions = (torch.randn(s, generator=generator) for s in ((6, 16), (2, 3, 32)))
    schedule = make_schedule(ScheduleSpec(clip_timesteps=950), 25).table
    together = session(
        x=x, step=int32(steps), token=int32(tokens), conditions=conditions, guidance=guidance,
        schedule=schedule,
    )  # fmt: skip
    for row, (step, token) in enumerate(zip(steps, tokens, strict=True)):
        alone = session(
            x=x[row : row + 1], step=int32([step]), token=int32([0]),
            conditions=conditions[:, token : token + 1], guidance=guidance[row : row + 1],
            schedule=schedule,
        )  # fmt: skip
        for name, value in alone.items():
            assert relative_error(together[name][row], value[0]) < 1e-5, (row, name)


@pytest.mark.parametrize("name", ["trajectory", "trajectory_cfg"])
def test_denoiser_loop_golden(graph, name, golden_settings):
    scale = golden_settings["denoiser_cfg_scale"] if name.endswith("cfg") else 1.0
    got = graph("denoiser_loop")(
        noise0=VECTORS["trajectory.noise0"], noise=VECTORS["trajectory.noise"],
        conditions=VECTORS[f"{name}.z"].reshape(-1, 5, 32), guidance=torch.full((5,), scale),
        temperature=torch.ones(5), schedule=make_schedule(ScheduleSpec(), 25).table,
    )  # fmt: skip
    for output, vector in (("sample", "sample"), ("mean", "mean"), ("sum_log_std", "sum_log_std")):
        assert relative_error(got[output], VECTORS[f"{name}.{vector}"]) < TOLERANCE, output
    assert relative_error(got["log_std"].exp(), VECTORS[f"{name}.std"]) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("steps", [2, 3, 25])
def test_denoiser_loop_axes_are_free(graph, rows, branches, steps):
    check_sizes(graph, "denoiser_loop", {"rows": rows, "branches": branches, "steps": steps})


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_loop_equals_single_steps(graph, temperature):
    """The loop is S calls of `denoiser`, each adding temperature * std * noise but the last."""
    generator = torch.Generator().manual_seed(0)
    x, noise, conditions = (
        torch.randn(shape, generator=generator) for shape in ((3, 16), (10, 3, 16), (2, 3, 32))
    )
    schedule = make_schedule(ScheduleSpec(clip_timesteps=950), 10).table
    shared = {"conditions": conditions, "guidance": torch.full((3,), 2.0), "schedule": schedule}
    loop = graph("denoiser_loop")(
        noise0=x, noise=noise, temperature=torch.full((3,), temperature), **shared
    )
    total = torch.zeros(3, 16)
    for step in reversed(range(10)):
        out = graph("denoiser")(x=x, step=int32([step] * 3), token=int32(range(3)), **shared)
        x = out["mean"]
        if step > 0:
            x = x + temperature * out["log_std"].exp() * noise[step]
            total += out["log_std"]
    expected = {"sample": x, "mean": x, "log_std": out["log_std"], "sum_log_std": total}
    for name, value in expected.items():
        assert relative_error(loop[name], value) < TOLERANCE, name


def test_noise_of_the_last_step_is_not_used(graph):
    session = graph("denoiser_loop")
    sizes = {"rows": 2, "branches": 1, "steps": 5}
    inputs = session.spec.example_inputs(sizes)
    inputs["schedule"] = make_schedule(ScheduleSpec(clip_timesteps=950), 5).table
    expected = {name: value.clone() for name, value in session(**inputs).items()}
    inputs["noise"][0] = 1e6
    assert all(torch.equal(value, expected[name]) for name, value in session(**inputs).items())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_pixel_decoder(graph, batch):
    """Channel 4 r + c of a token is the pixel in row r, column c of its 4 x 4 patch."""
    patches = torch.randn(batch, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    # Axes of `patches`: image, row of the patch, column of the patch, row and column inside it.
    latents = patches.permute(0, 3, 4, 1, 2).reshape(batch, 16, 4, 4)
    images = patches.permute(0, 1, 3, 2, 4).reshape(batch, 1, 16, 16).clamp(-1, 1)
    assert torch.equal(graph("decoder")(latents=latents.contiguous())["images"], images)
