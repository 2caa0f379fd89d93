"""Whole images, step by step, against the authors' sampler with the recorded noise."""

import pytest
from recorded import RecordedNoise, relative_error, vectors
from tiny_pair import make_batch, make_head, torch_member

from cspd.engines.backends import open_session
from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.runtime.decode.alone import Alone
from cspd.runtime.decode.decoder import decode
from cspd.runtime.decode.member import Member
from cspd.runtime.decode.plan import MaskPlan
from cspd.runtime.decode.sampler import Sampler

TOLERANCE = {"torch": 5e-5, "onnxruntime": 1e-4}


@pytest.fixture(params=["denoiser_loop", "denoiser"])
def head(request) -> str:
    return request.param


@pytest.fixture(params=["torch", "onnxruntime"])
def backend(request) -> str:
    return request.param


@pytest.fixture
def member(backend, head, tiny_bundle) -> Member:
    if backend == "torch":
        return torch_member("target", head)
    sessions = [
        open_session(tiny_bundle, f"target/{name}", backend, threads=1)
        for name in ("backbone", head)
    ]
    return Member("target", sessions[0], make_head(sessions[1]))


@pytest.mark.parametrize("fixed_shapes", [True, False])
def test_image_golden(member, backend, fixed_shapes, golden_settings):
    reference, steps = vectors(), []
    sampler = Sampler(
        MaskPlan(16, golden_settings["num_iter"], golden_settings["cfg_scale"], "linear"),
        make_schedule(ScheduleSpec(), golden_settings["num_sampling_steps"]),
        RecordedNoise(),
        golden_settings["temperature"],
        fixed_shapes,
    )
    batch = make_batch([0, 1], reference["image.labels"].tolist())

    def keep(canvas, statistics):
        steps.append((canvas.tokens.clone(), list(canvas.known)))

    canvas, statistics = decode(Alone(sampler, member, 16), batch, keep)
    assert statistics.target_rounds == len(steps) == golden_settings["num_iter"]
    masked = [*reference["image.mask_len"].tolist()[:-1], 0]
    for index, (tokens, known) in enumerate(steps):
        assert known == [16 - masked[index]] * 2
        error = relative_error(tokens, reference[f"image.step{index}.tokens"])
        assert error < TOLERANCE[backend], index
    latents = canvas.tokens.transpose(1, 2).reshape(2, 16, 4, 4)
    assert relative_error(latents, reference["image.latents"]) < TOLERANCE[backend]


def test_temperature_scales_the_noise_of_every_step(member):
    """At temperature 1e-6 the chains of two seeds that share their start end at the same token."""
    reference = vectors()
    results = []
    for factor in (1.0, -1.0):
        noise = RecordedNoise()
        noise._vectors["image.noise"] = factor * noise._vectors["image.noise"]
        schedule = make_schedule(ScheduleSpec(clip_timesteps=950), 25)
        sampler = Sampler(MaskPlan(16, 6), schedule, noise, temperature=1e-6)
        batch = make_batch([0, 1], reference["image.labels"].tolist())
        results.append(decode(Alone(sampler, member, 16), batch)[0].tokens)
    assert relative_error(*results) < 1e-4
    assert results[0].abs().max() > 0.1
