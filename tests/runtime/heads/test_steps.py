"""Annealed denoising steps: which token gets how many, alone or in a mixed call."""

import pytest
import torch
from chains import network_tokens
from stubs import StubHead, batch_of, make_sampler, member

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.runtime.decode.alone import Alone
from cspd.runtime.decode.cspd import Speculative
from cspd.runtime.decode.decoder import decode
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.heads.base import HeadSample
from cspd.runtime.heads.steps import Annealing, HeadSteps
from cspd.runtime.noise import Noise, Purpose

CLIPPED = ScheduleSpec(clip_timesteps=950)


def annealing(text, counts):
    return Annealing(HeadSteps.parse(text), {n: make_schedule(CLIPPED, n) for n in counts})


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("50:20", 4, [50, 40, 30, 20]),
        ("50:20", 3, [50, 35, 20]),
        ("20:50", 4, [20, 30, 40, 50]),
        ("50:20", 1, [50]),
        # DiSA cuts fractions off: 42.5 and 27.5, 30.5 and 11.75.
        ("50:20", 5, [50, 42, 35, 27, 20]),
        ("50:11", 5, [50, 40, 30, 20, 11]),
        ("100", 3, [100, 100, 100]),
    ],
)
def test_linear_from_first_to_last(text, count, expected):
    steps = HeadSteps.parse(text)
    assert [steps.at(index, count) for index in range(count)] == expected
    assert steps.constant == (len(set(expected)) == 1 and ":" not in text)


@pytest.mark.parametrize("text", ["1", "0:5", "5:1", "1:2:3", "many", "", "5:", "-5", "5.0", True])
def test_what_is_no_number_of_steps(text):
    with pytest.raises(ValueError, match="expected"):
        HeadSteps.parse(text)


def test_written_as_short_as_possible():
    assert HeadSteps.parse("100").value == HeadSteps.parse("100:100").value == 100
    assert HeadSteps.parse("50:20").value == "50:20"


class CountingHead:
    """The number of denoising steps as sample; keeps the sizes of its calls."""

    def __init__(self):
        self.sizes = []

    def __call__(self, rows, schedule, noise, purpose):
        self.sizes.append((schedule.num_steps, len(rows.images)))
        value = torch.full((len(rows.images), 2), float(schedule.num_steps))
        value[:, 1] = rows.images
        return HeadSample(value, value, value, value)


@pytest.mark.parametrize("whole", [True, False])
def test_mixed_call_gives_every_token_its_steps(whole):
    counts = torch.tensor([4, 6, 4, 5, 6])
    head, rows = CountingHead(), network_tokens(5)
    out = annealing("6:4", (4, 5, 6)).sample(
        head, rows, counts, Noise(0), Purpose.DENOISE, whole=whole
    )
    assert out.sample.tolist() == [[count, image] for image, count in enumerate(counts.tolist())]
    sizes = [(4, 5), (5, 5), (6, 5)] if whole else [(4, 2), (5, 1), (6, 2)]
    assert head.sizes == sizes


def test_image_goes_from_first_to_last():
    sampler = make_sampler(num_iter=5, annealing=annealing("7:3", range(3, 8)))
    counts = []

    class Head(StubHead):
        def __call__(self, rows, schedule, noise, purpose):
            counts.append(schedule.num_steps)
            return super().__call__(rows, schedule, noise, purpose)

    target = member("target")
    object.__setattr__(target, "head", Head())
    canvas, _ = decode(Alone(sampler, target, 4), batch_of(0, 1))
    assert canvas.done and counts == [7, 6, 5, 4, 3]


@pytest.mark.parametrize("verify", ["parallel", "prefix"])
def test_drafts_are_judged_with_the_steps_they_were_made_with(verify):
    """Else the aligned noise of draft and target would belong to different chains."""
    sampler = make_sampler(num_iter=8, annealing=annealing("6:3", range(3, 7)))
    made = {}

    def watch(role):
        class Head(StubHead):
            def __call__(self, rows, schedule, noise, purpose):
                keys = zip(rows.images.tolist(), rows.positions.tolist(), strict=True)
                for key in keys:
                    made.setdefault((role, key), []).append(schedule.num_steps)
                return super().__call__(rows, schedule, noise, purpose)

        found = member(role)
        object.__setattr__(found, "head", Head())
        return found

    options = CspdOptions(gamma=5, prefill=0.0, verify=verify)
    decoder = Speculative(sampler, watch("target"), watch("draft"), options, 4)
    canvas, _ = decode(decoder, batch_of(0))
    assert canvas.done
    # Equal heads: every draft is accepted, so that each token is drafted and judged once.
    for (role, key), counts in made.items():
        if role == "draft":
            assert counts[0] in made["target", key]
    assert {n for counts in made.values() for n in counts} == {3, 4, 5, 6}
