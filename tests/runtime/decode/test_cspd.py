"""Speculative decoding with stub networks: verdicts, truncation, context, guidance, noise.

D1 to D14 are defects of the released code; each that can be tested has its test here or in
test_acceptance.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import relative_error
from scipy import stats
from stubs import CHANNELS, LENGTH, batch_of, by_token, make_sampler, member
from tiny_pair import CLIPPED, make_batch, torch_member

from cspd.engines.errors import NonFiniteError
from cspd.engines.schedule import make_schedule
from cspd.runtime.decode.alone import Alone
from cspd.runtime.decode.canvas import Canvas
from cspd.runtime.decode.cspd import Speculative, commit
from cspd.runtime.decode.decoder import decode as run_all
from cspd.runtime.decode.decoder import ignore_progress
from cspd.runtime.decode.judge import judge, weigh
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.decode.plan import MaskPlan
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.decode.stats import Statistics, Verdicts
from cspd.runtime.decode.verify import prefix_conditions
from cspd.runtime.decode.window import Window
from cspd.runtime.heads.base import HeadSample
from cspd.runtime.noise import Noise, Purpose

MODES = ["parallel", "prefix"]
FAR = 1e3  # a shift of the target that no draft survives


def decode(sampler, target, draft, batch, on_round=ignore_progress, **options):
    """Speculative decoding with the paper's residual unless `options` say otherwise."""
    options = CspdOptions(**{"on_reject": "residual", **options})
    return run_all(Speculative(sampler, target, draft, options, CHANNELS), batch, on_round)


def odd_positions_far(rows) -> torch.Tensor:
    """The target disagrees with the draft at odd positions, and only there."""
    return FAR * (rows.positions % 2).float()


def total(verdicts: Verdicts) -> int:
    rejected = verdicts.resampled + verdicts.replaced_by_target + verdicts.fallback
    return verdicts.accepted + rejected + verdicts.discarded


def real_rows(sampler: Sampler, network) -> dict[tuple[int, int], list]:
    """What a stub was asked for, without padding: tokens of the step that its condition begins."""
    found = {}
    for (image, position), entries in by_token(network.head).items():
        order = sampler.noise.orders(torch.tensor([image]), LENGTH)[0].tolist()
        place = order.index(position)
        steps = [(entry, int(entry[1][1])) for entry in entries]
        real = [e for e, known in steps if known <= place < sampler.plan.stop(min(known, 15))]
        if real:
            found[image, position] = real
    return found


@pytest.mark.parametrize("mode", MODES)
def test_equal_pair_accepts_everything_and_makes_the_target_s_image(mode):
    batch, sampler = batch_of(0, 1, 2), make_sampler(cfg=3.0)
    canvas, statistics = decode(sampler, member("target"), member("draft"), batch, verify=mode)
    alone, _ = run_all(Alone(sampler, member("target"), CHANNELS), batch)
    assert torch.equal(canvas.tokens, alone.tokens)
    verdicts = statistics.verdicts
    assert verdicts.accepted == verdicts.proposed == 3 * LENGTH - statistics.prefilled
    assert total(replace(verdicts, accepted=0)) == 0
    assert verdicts.acceptance_rate == 1.0 and statistics.mean_distance == 0


@pytest.mark.parametrize("mode", MODES)
def test_draft_far_away_is_rejected_and_replaced_near_the_target(mode):
    sampler, target = make_sampler(), member("target", shift=FAR)
    canvas, statistics = decode(
        sampler, target, member("draft"), batch_of(0, 1), verify=mode, prefill=0,
        accept_temperature=1.0,
    )  # fmt: skip
    verdicts = statistics.verdicts
    assert verdicts.accepted == 0 and verdicts.acceptance_rate == 0
    # The residual of two laws that do not overlap is the target's: found at the first try.
    assert (verdicts.resampled, verdicts.fallback) == (2 * LENGTH, 0)
    if mode == "parallel":
        assert verdicts.discarded == 0
    else:
        assert verdicts.discarded == verdicts.proposed - 2 * LENGTH > 0
    # Tokens are 0.1 N(0, 1) + N(0, 1) + 1000, 6 sigma away at most (false alarm below 1e-6).
    assert (canvas.tokens - FAR).abs().max() < 6 * 1.01


@pytest.mark.parametrize("mode", MODES)
def test_no_residual_falls_back_to_the_target_s_own_sample(mode):
    """Equal last kernels, less sure target: released code wrote zero vectors here (D2)."""
    sampler = make_sampler()
    target, draft = member("target", sum_log_std=20.0), member("draft")
    canvas, statistics = decode(sampler, target, draft, batch_of(0, 1), verify=mode, prefill=0)
    alone, _ = run_all(Alone(sampler, member("target"), CHANNELS), batch_of(0, 1))
    assert statistics.verdicts.fallback == 2 * LENGTH
    assert statistics.verdicts.accepted == statistics.verdicts.resampled == 0
    assert torch.equal(canvas.tokens, alone.tokens)
    assert (canvas.tokens != 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_on_reject_target_takes_the_aligned_sample(mode):
    sampler, target = make_sampler(), member("target", shift=odd_positions_far)
    canvas, statistics = decode(
        sampler, target, member("draft"), batch_of(0, 1), verify=mode, on_reject="target"
    )
    alone, _ = run_all(Alone(sampler, member("target", shift=odd_positions_far), 4), batch_of(0, 1))
    assert torch.equal(canvas.tokens, alone.tokens)
    # Nothing failed: the target's token is what was asked for.
    verdicts = statistics.verdicts
    assert verdicts.replaced_by_target == verdicts.proposed - verdicts.discarded - verdicts.accepted
    assert verdicts.replaced_by_target > 0 == verdicts.resampled == verdicts.fallback


def test_parallel_judges_every_token_on_its_own():
    sampler, batch = make_sampler(), batch_of(0, 1)
    canvas, statistics = decode(
        sampler, member("target", shift=odd_positions_far), member("draft"), batch, prefill=0
    )
    assert statistics.verdicts == Verdicts(2 * LENGTH, LENGTH, LENGTH)
    draft_alone, _ = run_all(Alone(sampler, member("draft"), CHANNELS), batch)
    assert torch.equal(canvas.tokens[:, 0::2], draft_alone.tokens[:, 0::2])
    assert (canvas.tokens[:, 1::2] > FAR / 2).all()


def algorithm_1(order: list[int], plan: MaskPlan, gamma: int) -> Verdicts:
    """Verdicts of one sample when odd positions are rejected: draft gamma, stop at the first."""
    verdicts, known = Verdicts(), 0
    while known < plan.num_tokens:
        end = known
        while end < min(known + gamma, plan.num_tokens):
            end = plan.stop(end)
        verdicts.proposed += end - known
        for place in range(known, end):
            if order[place] % 2:
                verdicts.resampled += 1
                verdicts.discarded += end - place - 1
                break
            verdicts.accepted += 1
        known = place + 1
    return verdicts


@pytest.mark.parametrize("gamma", [1, 4, 7, 16])
@pytest.mark.parametrize("image", range(4))
def test_prefix_is_algorithm_1(gamma, image):
    """Draft, keep up to the first rejection, replace it, drop the rest (D8)."""
    sampler = make_sampler()
    target = member("target", shift=odd_positions_far)
    _, statistics = decode(
        sampler, target, member("draft"), batch_of(image), verify="prefix", prefill=0, gamma=gamma
    )
    order = sampler.noise.orders(torch.tensor([image]), LENGTH)[0].tolist()
    assert statistics.verdicts == algorithm_1(order, sampler.plan, gamma)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fixed_shapes", [True, False])
def test_ragged_batch_equals_every_sample_alone(seed, fixed_shapes):
    """Per-sample truncation: images and verdicts are those of a run alone, to the bit."""

    def far_and_context(rows):
        return odd_positions_far(rows) + context_shift(rows)

    def pair():
        return member("target", shift=far_and_context), member("draft", shift=context_shift)

    sampler = make_sampler(seed, cfg=3.0, fixed_shapes=fixed_shapes)
    options = {"verify": "prefix", "gamma": 3, "prefill": 0.1}
    lengths: list[set[int]] = []

    def watch(canvas, statistics):
        lengths.append(set(canvas.known))

    together, statistics = decode(
        sampler, *pair(), batch_of(0, 1, 2, 3, 4), on_round=watch, **options
    )
    assert max(map(len, lengths)) >= 3  # the batch was ragged indeed
    for row in range(5):
        alone, single = decode(sampler, *pair(), batch_of(row), **options)
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert statistics.per_image[row] == single.per_image[0]


def test_shapes_of_a_ragged_batch_depend_on_the_settings_alone():
    """However far its samples are apart, so that no other sample can change a rounding."""
    sampler, options = make_sampler(cfg=3.0), {"verify": "prefix", "gamma": 3, "prefill": 0}
    target, draft = member("target", shift=odd_positions_far), member("draft")
    decode(sampler, target, draft, batch_of(0, 1, 2), **options)
    widest = {"draft": sampler.plan.widest, "target": options["gamma"] - 1 + sampler.plan.widest}
    for network in (target, draft):
        shapes = {(c["visible"].shape, c["positions"].shape) for c in network.backbone.calls}
        assert shapes == {((6, LENGTH), (6, widest[network.name]))}
        assert {len(rows.images) for _, rows, _ in network.head.calls} == {3 * widest[network.name]}


def context_shift(rows) -> torch.Tensor:
    """Tokens that depend on everything that was visible, and on the label."""
    return 0.01 * rows.conditions[0].sum(-1) + 0.001 * rows.guidance


OPTIONS = st.fixed_dictionaries(
    {
        "gamma": st.integers(1, LENGTH),
        "prefill": st.floats(0, 1),
        "accept_temperature": st.sampled_from([0.1, 1.0, 42.0]),
        "verify": st.sampled_from(MODES),
        "align": st.booleans(),
        "on_reject": st.sampled_from(["residual", "target"]),
        "residual_temperature": st.sampled_from([1.0, 42.0]),
        "count_in": st.sampled_from(["tokens", "steps"]),
    }
)


@settings(deadline=None, max_examples=40)
@given(OPTIONS, st.integers(1, LENGTH), st.integers(0, 2**32), st.booleans())
def test_counts_add_up(options, num_iter, seed, fixed_shapes):
    """Every proposed token has one fate; every token of every image has one origin."""
    sampler = make_sampler(seed, num_iter, cfg=2.0, fixed_shapes=fixed_shapes)
    pair = member("target", shift=context_shift), member("draft", shift=0.05, sum_log_std=0.1)
    images = 3
    canvas, statistics = decode(sampler, *pair, batch_of(*range(images)), **options)
    verdicts = statistics.verdicts
    assert verdicts.proposed == total(verdicts)
    made = verdicts.proposed - verdicts.discarded + statistics.prefilled
    assert made == images * LENGTH and canvas.done
    assert options["verify"] == "prefix" or verdicts.discarded == 0
    for group in (statistics.rounds.values(), statistics.per_image):
        summed = Verdicts()
        for part in group:
            assert part.proposed == total(part)
            summed.add(part)
        assert summed == verdicts
    judged = verdicts.proposed - verdicts.discarded
    if judged:
        assert verdicts.acceptance_rate == verdicts.accepted / judged
    else:
        assert verdicts.acceptance_rate is None and statistics.mean_distance is None
    assert canvas.tokens.isfinite().all() and (canvas.tokens != 0).any(-1).all()
    assert statistics.draft_calls == len(pair[1].backbone.calls)
    # One head call per step or round; the transformer may take several, one for each prefix.
    assert statistics.target_rounds == len(pair[0].head.calls) <= len(pair[0].backbone.calls)
    evaluated = sum(len(call["tokens"]) for call in pair[0].backbone.calls)
    assert evaluated == statistics.target_calls * images * 2  # both branches of guidance


@pytest.mark.parametrize("share", [0, 0.05, 0.15, 0.25, 0.5, 1])
def test_prefill_counts_tokens(share):
    """The target makes the least number of whole steps with that share of TOKENS (D13)."""
    sampler, target = make_sampler(), member("target")
    _, statistics = decode(sampler, target, member("draft"), batch_of(0, 1), prefill=share)
    wanted = int(share * LENGTH)
    made = min(known for known in (0, *sampler.plan.boundaries) if known >= wanted)
    assert statistics.prefilled == 2 * made
    assert statistics.verdicts.proposed == 2 * (LENGTH - made)
    assert all(call["visible"].shape[1] < LENGTH for call in target.backbone.calls)


def test_prefill_of_everything_is_the_target_alone():
    sampler = make_sampler()
    target, draft = member("target", shift=context_shift), member("draft")
    canvas, statistics = decode(sampler, target, draft, batch_of(0, 1), prefill=1.0)
    alone, plain = run_all(Alone(sampler, member("target", shift=context_shift), 4), batch_of(0, 1))
    assert torch.equal(canvas.tokens, alone.tokens)
    assert statistics.target_rounds == plain.target_rounds == sampler.plan.num_iter
    assert statistics.draft_calls == 0 and statistics.verdicts == Verdicts()


def test_gamma_counts_tokens():
    """A window holds the least number of whole steps with gamma tokens (D13)."""
    sampler = make_sampler()
    for gamma in range(1, LENGTH + 1):
        draft = member("draft")
        _, statistics = decode(
            sampler, member("target"), draft, batch_of(0), gamma=gamma, prefill=0
        )
        known, windows = 0, {}
        while known < LENGTH:
            start = known
            while known < min(start + gamma, LENGTH):
                known = sampler.plan.stop(known)
            windows[start] = known - start
        assert {k: v.proposed for k, v in statistics.rounds.items()} == windows
        assert statistics.target_rounds == len(windows)


@pytest.mark.parametrize("fixed_shapes", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_rounds_and_evaluations_are_counted_apart(mode, fixed_shapes):
    """A verification of prefixes evaluates the target once for every drafted step of its window."""
    target, drafts, images = member("target", shift=odd_positions_far), [], 3
    sampler = make_sampler(fixed_shapes=fixed_shapes)

    def watch(canvas, statistics):
        drafts.append(statistics.draft_calls)

    _, statistics = decode(
        sampler, target, member("draft"), batch_of(*range(images)), on_round=watch,
        verify=mode, gamma=6, prefill=0.2,
    )  # fmt: skip
    prefilled = drafts.count(0)
    verified = statistics.draft_calls if mode == "prefix" else len(drafts) - prefilled
    assert statistics.target_rounds == len(drafts)
    assert statistics.target_calls == prefilled + verified
    assert (statistics.target_calls > statistics.target_rounds) == (mode == "prefix")
    rows = sum(len(call["tokens"]) for call in target.backbone.calls)
    assert rows == images * statistics.target_calls


@pytest.mark.parametrize("mode", MODES)
def test_distance_is_that_of_judged_tokens_of_wanted_images(mode):
    """Neither tokens that were discarded count nor those of images that only fill the batch."""

    def shift(rows):
        return torch.where(rows.images == 2, 7 * FAR, 1.0) * odd_positions_far(rows)

    batch = replace(batch_of(0, 1, 2), count=2)
    _, statistics = decode(
        make_sampler(), member("target", shift=shift), member("draft"), batch, verify=mode,
        prefill=0,
    )  # fmt: skip
    # Every token is judged once, and half of them lie FAR away in each of four channels.
    assert statistics.mean_distance == pytest.approx(FAR * CHANNELS**0.5 / 2, rel=1e-5)


def window_of(canvas: Canvas, drafted: HeadSample) -> Window:
    """A window of all tokens of `canvas` that one step drafted."""
    span = canvas.span([0], [LENGTH])
    ones = torch.ones(1, LENGTH)
    return Window(span, drafted, ones, torch.zeros(1, LENGTH, dtype=torch.int64), [[0]])


@pytest.mark.parametrize("temperature", [0.5, 0.9, 1.0, 1.1])
@pytest.mark.parametrize("accept_temperature", [1.0, 42.0])
def test_test_uses_the_kernels_that_were_sampled(temperature, accept_temperature):
    """Brute force in float64: densities of two aligned chains whose steps have this temperature."""
    rng = np.random.default_rng(3)
    steps, shape = 4, (1, LENGTH, CHANNELS)
    std = {who: rng.uniform(0.3, 2, (steps, *shape)) for who in "pq"}
    mean = {who: rng.normal(size=(steps, *shape)) for who in "pq"}
    noise, drafted = rng.normal(size=(steps, *shape)), mean["q"][0]
    density, heads = {}, {}
    for who in "pq":
        sampled = temperature * std[who]
        path = stats.norm.logpdf(
            mean[who][1:] + sampled[1:] * noise[1:], mean[who][1:], sampled[1:]
        )
        last = stats.norm.logpdf(drafted, mean[who][0], accept_temperature * sampled[0])
        density[who] = path.sum((0, -1)) + last.sum(-1)
        logs = np.log(std[who])
        values = (mean[who][0], mean[who][0], logs[0], logs[1:].sum(0))
        heads[who] = HeadSample(*(torch.tensor(value, dtype=torch.float32) for value in values))
    sampler, batch = make_sampler(temperature=temperature), batch_of(0)
    canvas = sampler.begin(batch, CHANNELS)
    options = CspdOptions(accept_temperature=accept_temperature)
    ratio, _ = weigh(sampler, options, batch, window_of(canvas, heads["q"]), heads["p"])
    # The figure: 2e-5 where the densities are right, up to 39 without the temperature.
    np.testing.assert_allclose(ratio, density["p"] - density["q"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("residual_temperature", [1.0, 42.0])
def test_residual_is_drawn_from_the_kernel_that_was_sampled(temperature, residual_temperature):
    """Of a target that no draft meets it is the whole kernel: here with a deviation of 1.

    Kolmogorov-Smirnov at level 1e-4 over six settings, fixed seed.
    """
    sampler, batch = make_sampler(temperature=temperature), batch_of(*range(20))
    target = member("target", shift=10 * FAR)
    canvas, statistics = decode(
        sampler, target, member("draft"), batch, prefill=0,
        residual_temperature=residual_temperature,
    )  # fmt: skip
    assert statistics.verdicts.resampled == 20 * LENGTH
    alone, _ = run_all(Alone(sampler, member("target", shift=10 * FAR), CHANNELS), batch)
    scores = (canvas.tokens - alone.tokens) / (residual_temperature * temperature)
    assert stats.kstest(scores.flatten().numpy(), "norm").pvalue > 1e-4 / 6


def test_windows_in_steps_are_those_of_the_released_runner():
    """It prefills whole steps, and verifies after steps 0, gamma, 2 gamma, ... (D13)."""
    sampler = make_sampler(num_iter=10)
    ends = (0, *sampler.plan.boundaries)
    _, statistics = decode(
        sampler, member("target", shift=FAR), member("draft"), batch_of(0, 1), gamma=4,
        prefill=0.15, count_in="steps",
    )  # fmt: skip
    # Two of ten steps by the target; then steps 2 to 4, 5 to 8, and 9.
    assert statistics.prefilled == 2 * ends[2]
    windows = {ends[2]: ends[5] - ends[2], ends[5]: ends[9] - ends[5], ends[9]: LENGTH - ends[9]}
    assert {k: v.proposed for k, v in statistics.rounds.items()} == {
        known: 2 * tokens for known, tokens in windows.items()
    }
    assert statistics.target_rounds == 2 + 3


def test_prefix_sees_the_drafts_before_it():
    """The target's condition of a drafted token comes from exactly the tokens before its step (D6).

    A stub's condition holds the sum and number of the tokens it saw: it must be the condition
    that the draft, which sees its own tokens, had at the same place.
    """
    sampler, batch = make_sampler(), batch_of(0, 1)
    target, draft = member("target"), member("draft")
    decode(sampler, target, draft, batch, verify="prefix", prefill=0, gamma=6)
    asked, proposed = real_rows(sampler, target), real_rows(sampler, draft)
    assert set(asked) == {(image, position) for image in (0, 1) for position in range(LENGTH)}
    lengths = set()
    for key, ((_, condition, _),) in asked.items():
        ((_, expected, _),) = proposed[key]
        assert condition == expected
        lengths.add(condition[1])
    # Conditions of every drafted step, not only of the first of each window.
    assert lengths == {0.0, *(float(known) for known in sampler.plan.boundaries[:-1])}


def test_parallel_sees_only_what_was_known_before_the_window():
    sampler, target, draft = make_sampler(), member("target"), member("draft")
    _, statistics = decode(sampler, target, draft, batch_of(0, 1), gamma=6, prefill=0)
    lengths = {call["visible_len"][0].item() for call in target.backbone.calls}
    assert lengths == set(statistics.rounds)
    for (image, position), ((_, condition, _),) in by_token(target.head).items():
        assert condition[1] in lengths, (image, position)


def test_real_transformer_sees_the_drafts_before_it():
    """All prefixes in one batch give the conditions of every step computed on its own (D6)."""
    schedule = make_schedule(CLIPPED, 5)
    sampler = Sampler(MaskPlan(16, 6, 3.0, "linear"), schedule, Noise(3))
    target, draft, batch = torch_member("target"), torch_member("draft"), make_batch([0, 1])
    canvas = sampler.begin(batch, 16)
    drafting = Speculative(sampler, target, draft, CspdOptions(gamma=12), 16)
    window = drafting.propose(batch, canvas, Statistics())
    got = prefix_conditions(sampler, target, batch, canvas, window)
    ahead, done = sampler.begin(batch, 16), 0
    for _ in window.starts[0]:
        span, _ = sampler.step(draft, ahead, batch)
        expected = sampler.conditions(target, ahead, batch, span)
        part = got[:, :, done : done + span.width]
        assert relative_error(part, expected) < 1e-5
        done += span.width
    assert done == window.span.width > 4


def test_rejected_token_and_what_follows_are_drafted_again():
    """After a rejection the next window begins right behind the replaced token (D8)."""
    sampler, batch = make_sampler(), batch_of(0)
    target, draft = member("target", shift=odd_positions_far), member("draft")
    options = CspdOptions(verify="prefix", gamma=8, on_reject="residual")
    canvas = sampler.begin(batch, CHANNELS)
    decoder = Speculative(sampler, target, draft, options, CHANNELS)
    window = decoder.propose(batch, canvas, Statistics())
    samples = decoder.verify(batch, canvas, window)
    commit(canvas, judge(sampler, options, batch, window, samples))
    order = canvas.sequence[0].long()
    first_odd = next(i for i in range(LENGTH) if order[i] % 2)
    assert canvas.known == [first_odd + 1]
    assert torch.equal(canvas.tokens[0, order[:first_odd]], window.drafted.sample[0, :first_odd])
    assert (canvas.tokens[0, order[first_odd]] > FAR / 2).all()
    assert not canvas.tokens[0, order[first_odd + 1 :]].any()
    later = decoder.propose(batch, canvas, Statistics())
    assert later.starts[0][0] == first_odd + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_every_token_is_judged_with_the_guidance_it_was_drafted_with(mode, schedule):
    """Also where the guidance changes from step to step within a window (D9)."""
    sampler = make_sampler(cfg=4.0, cfg_schedule=schedule)
    target, draft = member("target", shift=odd_positions_far), member("draft")
    decode(sampler, target, draft, batch_of(0, 1), verify=mode, gamma=6, prefill=0.2)
    judged, different = by_token(target.head), set()
    for key, entries in real_rows(sampler, draft).items():
        for guidance, (_, known, _), _ in entries:
            # What the draft's own step prescribes: it starts with the tokens that the stub saw.
            assert guidance == pytest.approx(sampler.plan.guidance(int(known)))
            assert guidance in [scale for scale, _, _ in judged[key]]
            different.add(guidance)
    assert len(different) == 1 if schedule == "constant" else len(different) > 3


class SpyNoise(Noise):
    """Noise that remembers which tokens it was asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.resampled: list[tuple[int, int]] = []

    def normal(self, purpose, images, positions, steps, channels):
        if purpose == Purpose.RESAMPLE:
            self.resampled += list(zip(images.tolist(), positions.tolist(), strict=True))
        return super().normal(purpose, images, positions, steps, channels)


@pytest.mark.parametrize("mode", MODES)
def test_only_rejected_tokens_are_resampled(mode):
    """No work and no random numbers for accepted rows (D10)."""
    noise = SpyNoise(0)
    sampler = make_sampler(noise=noise)
    target = member("target", shift=odd_positions_far)
    _, statistics = decode(sampler, target, member("draft"), batch_of(0, 1), verify=mode, prefill=0)
    assert len(noise.resampled) == statistics.verdicts.resampled == LENGTH
    assert sorted(noise.resampled) == [(i, p) for i in (0, 1) for p in range(1, LENGTH, 2)]


@pytest.mark.parametrize("align", [True, False])
def test_alignment_changes_the_noise_of_the_draft_only(align):
    target, draft = member("target"), member("draft")
    sampler = make_sampler()
    decode(sampler, target, draft, batch_of(0, 1), align=align, prefill=0.2)
    purpose = Purpose.DENOISE if align else Purpose.DENOISE_DRAFT
    assert {call[0] for call in draft.head.calls} == {purpose}
    assert {call[0] for call in target.head.calls} == {Purpose.DENOISE}
    proposed, judged = by_token(draft.head), by_token(target.head)
    same = [torch.equal(proposed[key][-1][2], judged[key][-1][2]) for key in proposed]
    assert all(same) if align else not any(same)


@pytest.mark.parametrize("who", ["target", "draft"])
def test_broken_token_names_model_image_and_step(who):
    """NaN in image 7 at its first token after 3 known ones: no result, and both are named."""

    def broken(rows):
        hit = (rows.images == 7) & (rows.conditions[0, :, 1] >= 3)
        return torch.where(hit, torch.nan, 0.0)

    shifts = {"target": 0.0, "draft": 0.0, who: broken}
    members = [member(name, shift=shift) for name, shift in shifts.items()]
    sampler = make_sampler()
    first = min(known for known in sampler.plan.boundaries if known >= 3)
    with pytest.raises(NonFiniteError) as caught:
        decode(sampler, *members, batch_of(5, 7), verify="parallel", gamma=1, prefill=0)
    message = str(caught.value)
    assert message.startswith(f"{who} denoiser: NaN or infinity in image 7")
    assert f"starts with {first} known tokens" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["mean", "log_std", "sum_log_std"])
@pytest.mark.parametrize("who", ["target", "draft"])
def test_broken_density_is_rejected(what, who, value):
    """Finite tokens of which one density is not: rejected, the target's sample instead (D4).

    A draft whose density is 0 would make the ratio infinite, in the test as in the residual.
    """
    members = {name: member(name) for name in ("target", "draft")}
    head = members[who].head

    class BrokenHead:
        def __call__(self, *arguments):
            sampled = head(*arguments)
            return replace(sampled, **{what: torch.full_like(sampled.mean, value)})

    members[who] = replace(members[who], head=BrokenHead())
    sampler = make_sampler()
    canvas, statistics = decode(
        sampler, members["target"], members["draft"], batch_of(0, 1), prefill=0
    )
    assert statistics.verdicts.fallback == 2 * LENGTH
    alone, _ = run_all(Alone(sampler, member("target"), CHANNELS), batch_of(0, 1))
    assert torch.equal(canvas.tokens, alone.tokens)


def test_real_equal_pair_under_prefix_is_the_target_alone():
    sampler = Sampler(MaskPlan(16, 6, 3.0, "linear"), make_schedule(CLIPPED, 10), Noise(0))
    batch, target = make_batch([0, 1, 2, 3]), torch_member("target")
    draft = replace(target, name="draft")
    options = CspdOptions(verify="prefix", prefill=0, on_reject="residual")
    canvas, statistics = run_all(Speculative(sampler, target, draft, options, 16), batch)
    assert statistics.verdicts.accepted == statistics.verdicts.proposed == 64
    alone, _ = run_all(Alone(sampler, target, 16), batch)
    assert relative_error(canvas.tokens, alone.tokens) < 1e-4


def test_parallel_equals_a_target_with_as_many_steps_if_its_own_samples_replace_everything():
    """What parallel verification is at heart (D7): the target at one step per window."""
    options = {"gamma": 5, "prefill": 0, "on_reject": "target"}
    sampler = make_sampler()
    target, draft = member("target", shift=context_shift), member("draft", shift=-FAR)
    canvas, statistics = decode(sampler, target, draft, batch_of(0, 1), **options)
    assert statistics.verdicts.accepted == 0
    coarse = sampler.begin(batch_of(0, 1), CHANNELS)
    judge, stops = member("target", shift=context_shift), [*statistics.rounds, LENGTH][1:]
    for stop in stops:
        span = coarse.span(coarse.known, [stop] * 2)
        z = sampler.conditions(judge, coarse, batch_of(0, 1), span)
        sampled = sampler.sample(
            judge, z, sampler.guidance(span), batch_of(0, 1), span, Purpose.DENOISE
        )
        coarse.place(span, sampled.sample)
        coarse.known = [stop] * 2
    assert torch.equal(canvas.tokens, coarse.tokens)
