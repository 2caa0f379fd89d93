"""Which random numbers the methods take, and how often: each once, but where sharing is meant.

Mutants in these tests and the ones they were written for: tests keyed without position, ACCEPT
keyed without position or image or taken from RESAMPLE_ACCEPT, all tries of the residual with one
key, numbers of a chain that ignore its purpose, uniform numbers that reach 1.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from chains import LEVEL, MUTANT_LEVEL, SCHEDULE, tokens
from mixture import MixtureDenoiser
from reference_round import ReferenceRound
from scipy import stats
from stubs import CHANNELS, LENGTH, batch_of, by_token, make_sampler, member
from tiny_pair import CLIPPED, make_batch, torch_member

from cspd.engines.schedule import COLUMNS, make_schedule
from cspd.runtime.decode.alone import Alone
from cspd.runtime.decode.cspd import Speculative
from cspd.runtime.decode.decoder import decode
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.decode.plan import MaskPlan
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.heads.numbers import ChainNumbers
from cspd.runtime.heads.relax import LenientNumbers
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.heads.speculative_loop import SpeculativeLoopHead
from cspd.runtime.noise import Noise, Purpose, to_normal, to_uniform

FULL = 0xFFFFFFFF
IMAGES = (0, 1)
EVERY = [(image, position) for image in IMAGES for position in range(LENGTH)]
STEPS = 5


class CountingNoise(Noise):
    """Counts how often each number was asked for, by (purpose, image, position, step)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.asked: Counter = Counter()

    def note(self, purpose, *index) -> None:
        rows = torch.stack(torch.broadcast_tensors(*index), dim=-1).flatten(0, -2)
        self.asked.update((purpose, *row) for row in rows.tolist())

    def normal(self, purpose, images, positions, steps, channels):
        self.note(purpose, images, positions, steps)
        return super().normal(purpose, images, positions, steps, channels)

    def uniform(self, purpose, images, positions, steps, count=1):
        self.note(purpose, images, positions, steps)
        return super().uniform(purpose, images, positions, steps, count)

    def normal_and_uniform(self, purpose, images, positions, steps, channels, count):
        self.note(purpose, images, positions, steps)
        return super().normal_and_uniform(purpose, images, positions, steps, channels, count)

    def orders(self, images, num_tokens):
        zero = torch.zeros_like(images)
        self.note(Purpose.ORDER, images, zero, zero)
        return super().orders(images, num_tokens)


def keys(purpose, where, steps=1):
    return [(purpose, *token, step) for token in where for step in range(steps)]


def orders(images=IMAGES):
    return Counter(keys(Purpose.ORDER, [(image, 0) for image in images]))


# --- whole methods -------------------------------------------------------------------------------


def tiny_sampler(noise) -> Sampler:
    return Sampler(MaskPlan(LENGTH, 6, 3.0, "linear"), make_schedule(CLIPPED, STEPS), noise)


def speculative(role: str, kind: str = "rounds"):
    """A member of the tiny pair whose head speculates, in rounds or in one loop."""
    options = SpeculationOptions(window=4)
    if kind == "loop":
        plain = torch_member(role, "speculative_loop")
        return replace(plain, head=SpeculativeLoopHead(plain.head.session, options))
    plain = torch_member(role, "denoiser")
    return replace(plain, head=SpeculativeHead(ReferenceRound(plain.head.session), options, 16))


def chains(where, purpose=Purpose.DENOISE, steps=STEPS):
    """Numbers of a denoising chain: its start and a number for every step."""
    return Counter(keys(purpose, where, steps + 1))


def split(asked, *purposes):
    """The entries of some purposes, and the others."""
    part = Counter({key: count for key, count in asked.items() if key[0] in purposes})
    return part, asked - part


def in_order(candidates, where):
    """Whether candidates of every token are numbered from 0 without a gap, each asked for once."""
    numbers = {token: sorted(k[3] for k in candidates if k[1:3] == token) for token in where}
    return set(candidates.values()) == {1} and all(
        found == list(range(len(found))) and found for found in numbers.values()
    )


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_model_alone_takes_every_number_once(role):
    noise = CountingNoise()
    decode(Alone(tiny_sampler(noise), torch_member(role), 16), make_batch(list(IMAGES)))
    assert noise.asked == orders() + chains(EVERY)


@pytest.mark.parametrize("kind", ["rounds", "loop"])
def test_speculative_denoising_takes_every_number_once(kind):
    noise = CountingNoise()
    batch = make_batch(list(IMAGES))
    decode(Alone(tiny_sampler(noise), speculative("target", kind), 16), batch)
    candidates, rest = split(noise.asked, Purpose.SPECULATE)
    # The tests of all steps of a token are one block of numbers.
    assert rest == orders() + chains(EVERY) + Counter(keys(Purpose.SPECULATE_TEST, EVERY))
    assert in_order(candidates, EVERY)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("on_reject", ["target", "residual"])
def test_cspd_takes_every_number_once_for_draft_and_target(align, on_reject):
    """Aligned, draft and target share the noise of a token, and nothing else is ever shared."""
    noise = CountingNoise()
    sampler = make_sampler(noise=noise)
    target = member("target", shift=lambda rows: 1e3 * (rows.positions % 2).float())
    options = CspdOptions(align=align, on_reject=on_reject, prefill=0.2, gamma=3)
    decode(Speculative(sampler, target, member("draft"), options, CHANNELS), batch_of(*IMAGES))
    first = options.windows(sampler.plan).first
    order = Noise(0).orders(torch.tensor(IMAGES), LENGTH).tolist()
    drafted = [(image, position) for image in IMAGES for position in order[image][first:]]
    rejected = [(image, position) for image, position in drafted if position % 2]
    own = Purpose.DENOISE if align else Purpose.DENOISE_DRAFT
    steps = sampler.schedule.num_steps
    expected = orders() + chains(EVERY, steps=steps) + chains(drafted, own, steps)
    expected += Counter(keys(Purpose.ACCEPT, drafted))
    if on_reject == "residual":
        for purpose in (Purpose.RESAMPLE, Purpose.RESAMPLE_ACCEPT):
            expected += Counter(keys(purpose, rejected, options.max_tries))
    assert noise.asked == expected


def test_prefix_verification_takes_a_number_again_only_for_a_token_that_was_discarded():
    """A discarded token was never judged: its numbers are still unused. Each is judged once."""
    noise = CountingNoise()
    sampler = make_sampler(noise=noise)
    target = member("target", shift=lambda rows: 1e3 * (rows.positions % 2).float())
    draft = member("draft")
    options = CspdOptions(verify="prefix", on_reject="residual", prefill=0, gamma=5)
    _, statistics = decode(Speculative(sampler, target, draft, options, CHANNELS), batch_of(0))
    windows = {token: len(found) for token, found in by_token(target.head).items()}
    assert windows == {token: len(found) for token, found in by_token(draft.head).items()}
    assert sum(windows.values()) == statistics.verdicts.proposed
    assert sum(n - 1 for n in windows.values()) == statistics.verdicts.discarded > 0
    expected = orders((0,))
    for token, count in windows.items():
        for _ in range(count):
            expected += chains([token] * 2, steps=sampler.schedule.num_steps)
            expected += Counter(keys(Purpose.ACCEPT, [token]))
    odd = [token for token in windows if token[1] % 2]
    for purpose in (Purpose.RESAMPLE, Purpose.RESAMPLE_ACCEPT):
        expected += Counter(keys(purpose, odd, options.max_tries))
    assert noise.asked == expected


@pytest.mark.parametrize("align", [True, False])
def test_speculative_chains_share_numbers_only_if_they_share_their_noise(align):
    noise = CountingNoise()
    options = CspdOptions(align=align, prefill=0, gamma=6)
    pair = speculative("target"), speculative("draft")
    decode(Speculative(tiny_sampler(noise), *pair, options, 16), make_batch(list(IMAGES)))
    if not align:
        assert set(noise.asked.values()) == {1}
        drafted = (Purpose.SPECULATE_DRAFT, Purpose.SPECULATE_TEST_DRAFT)
        assert {key[0] for key in noise.asked} >= {Purpose.DENOISE_DRAFT, *drafted}
        return
    tests, _ = split(noise.asked, Purpose.SPECULATE_TEST)
    both = [*EVERY, *EVERY]
    assert tests == Counter(keys(Purpose.SPECULATE_TEST, both))
    assert {key[0] for key in noise.asked} == {
        Purpose.ORDER, Purpose.DENOISE, Purpose.ACCEPT, Purpose.SPECULATE, Purpose.SPECULATE_TEST,
    }  # fmt: skip


# --- within the rounds of a head -----------------------------------------------------------------


class WatchedRound(ReferenceRound):
    """Remembers what each round was given and what came of it, by the token's number."""

    def __init__(self) -> None:
        super().__init__(MixtureDenoiser())
        self.history: dict[int, list[dict]] = {}

    def __call__(self, **tensors):
        out = super().__call__(**tensors)
        for row, token in enumerate(tensors["conditions"][0, :, 1].long().tolist()):
            if tensors["step"][row] < 0:
                continue
            state = {name: tensors[name][row] for name in ("x", "step", "x0", "fraction")}
            state |= {
                "candidates": tensors["candidates"][row],
                "tests": tensors["log_accept"][:, row],
            }
            state |= {name: int(out[name][row]) for name in ("moved", "drawn")}
            self.history.setdefault(token, []).append(state)
        return out


def test_rounds_consume_candidates_and_tests_once():
    """But for a round that is done again, which repeats its drafts and its tests: DESIGN.md."""
    watched = WatchedRound()
    options = SpeculationOptions(window=6, candidates=1)
    SpeculativeHead(watched, options, CHANNELS)(tokens(40), SCHEDULE, Noise(3))
    taken, repeats = Counter(), 0
    for history in watched.history.values():
        tested = Counter()
        for before, after in zip([None, *history], history, strict=False):
            taken.update(map(tuple, after["candidates"][: after["drawn"]].tolist()))
            if before is not None and not before["moved"]:
                repeats += 1
                for name in ("x", "step", "x0", "fraction", "tests"):
                    assert torch.equal(before[name], after[name])
            if after["moved"]:
                first, last = int(after["step"]), int(after["step"]) - after["moved"] + 1
                # The last row of a round is tested only if its draft was refused.
                tested.update(range(last + (after["drawn"] == 0), first + 1))
        assert not tested or set(tested.values()) == {1}
    assert repeats > 10 and set(taken.values()) == {1}


# --- two tokens ----------------------------------------------------------------------------------

PAIRS = 4000


class WithoutPosition(ChainNumbers):
    """The mutant whose tests are those of position 0."""

    def uniform(self, images, positions, num_steps):
        return super().uniform(images, torch.zeros_like(positions), num_steps)


class OfTwoImages(ChainNumbers):
    """The mutant whose tests are those of the next even image."""

    def uniform(self, images, positions, num_steps):
        return super().uniform(images // 2 * 2, positions, num_steps)


class CandidatesWithoutPosition(ChainNumbers):
    """The mutant whose candidates are those of position 0."""

    def candidates(self, images, positions, first, count, channels):
        return super().candidates(images, torch.zeros_like(positions), first, count, channels)


class ShiftedDenoiser(MixtureDenoiser):
    """One standard deviation away from the first draft, which is the centre of the data at 0."""

    def __call__(self, *, x, step, schedule, **_):
        row = dict(zip(COLUMNS, schedule[step].split(1, dim=1), strict=True))
        log_std = (0.5 * row["log_std_min"] + 0.5 * row["log_std_max"]).expand_as(x)
        zero, away = torch.zeros_like(x), CHANNELS**-0.5 * log_std.exp()
        mean = torch.where(step[:, None] > 0, row["mean_x"] * x + away, x)
        return {"mean": mean, "log_std": log_std, "x0": zero, "fraction": zero + 0.5}


def dependence(numbers, pair: str) -> float:
    """p-value of 40 correlations between two tokens with equal conditions, Bonferroni.

    Two denoising steps: one test, so that what it decides shows in the token.
    """
    rows = tokens(2 * PAIRS)
    first, second = torch.arange(2 * PAIRS) // 2, torch.arange(2 * PAIRS) % 2
    if pair == "positions":
        rows = replace(rows, images=first, positions=second)
    else:
        rows = replace(rows, images=2 * first + second, positions=torch.zeros_like(first))
    options = SpeculationOptions(window=2)
    head = SpeculativeHead(ReferenceRound(ShiftedDenoiser()), options, CHANNELS, numbers)
    sampled = head(rows, make_schedule(CLIPPED, 2), Noise(17))
    counts = sampled.stats
    # 1 - TV of two normal distributions one standard deviation apart is 0.617.
    assert counts.accepted.sum() / counts.tested.sum() == pytest.approx(0.617, abs=0.03)
    directions = torch.randn(CHANNELS, 20, generator=torch.Generator().manual_seed(9))
    values = sampled.sample @ directions
    columns = torch.cat([values, values.square()], dim=1).unflatten(0, (PAIRS, 2))
    pairs = zip(*(columns[:, side].T.numpy() for side in (0, 1)), strict=True)
    return 40 * min(stats.spearmanr(a, b).pvalue for a, b in pairs)


@pytest.mark.parametrize("pair", ["positions", "images"])
def test_two_tokens_with_equal_conditions_are_independent(pair):
    assert dependence(ChainNumbers, pair) > LEVEL


@pytest.mark.parametrize(
    ("mutant", "pair"),
    [(WithoutPosition, "positions"), (CandidatesWithoutPosition, "positions"),
     (OfTwoImages, "images")],
)  # fmt: skip
def test_mutant_with_numbers_in_common_is_caught(mutant, pair):
    assert dependence(mutant, pair) < MUTANT_LEVEL


# --- extremes of the generator -------------------------------------------------------------------


def test_uniform_numbers_of_extreme_words_lie_inside():
    """23 bits and a half: the ends are half a step away from 0 and 1, exactly."""
    uniform = to_uniform(torch.tensor([0, FULL]))
    assert uniform.dtype == torch.float32
    assert uniform.tolist() == [2.0**-24, 1 - 2.0**-24]
    assert (uniform.log() < 0).all() and uniform.log().isfinite().all()


def test_normal_numbers_of_extreme_words_are_finite():
    """At most sqrt(2 log 2^33): the word of the radius is taken half a step inside too."""
    ends = (0, 1, FULL - 1, FULL)
    words = torch.tensor([[radius, angle] for radius in ends for angle in ends])
    normal = to_normal(words)
    assert normal.isfinite().all() and normal.abs().max() <= (2 * 33 * 0.6931472) ** 0.5 + 1e-6
    assert normal.abs().max() > 6.7


def test_a_budget_leaves_tests_with_a_logarithm():
    class Extreme(Noise):
        def uniform(self, purpose, images, positions, steps, count=1):
            return to_uniform(torch.tensor([[0, FULL]]))

    index = torch.zeros(1, dtype=torch.int64)
    logs = LenientNumbers(Extreme(0), Purpose.DENOISE, 1.0).tests(index, index, 2)
    assert logs.isfinite().all() and (logs < 0).all()


def test_normal_and_uniform_numbers_of_one_key_come_from_different_words():
    """As if all uniform numbers had been asked for: the words of the normal ones come before."""
    noise, index = Noise(5), torch.arange(50)
    zero = torch.zeros_like(index)
    normal, uniform = noise.normal_and_uniform(Purpose.SPECULATE, index, zero, zero, 6, 3)
    assert torch.equal(normal, noise.normal(Purpose.SPECULATE, index, zero, zero, 6))
    # Six channels take two blocks of four words.
    every = noise.uniform(Purpose.SPECULATE, index, zero, zero, 11)
    assert torch.equal(uniform, every[:, 8:])
