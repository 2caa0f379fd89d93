"""The house has a door: another family of models runs through the loops as they are.

Raster order, keys and values kept from call to call, a flow-matching head, no classes; exported to
ONNX, decoded by `target`, `cspd` and `lossless`.
"""

import pytest
import torch
from scipy import stats
from tiny_pair import make_batch
from toy_family import CHANNELS, CONFIG, LENGTH, SCHEDULE, export_toy, toy_modules, toy_sampler

from cspd.engines.sessions.session import TorchSession
from cspd.runtime.decode.alone import Alone
from cspd.runtime.decode.cspd import Speculative
from cspd.runtime.decode.decoder import decode
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.heads.base import Rows
from cspd.runtime.heads.plain import StepHead
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.noise import Noise, Purpose

BATCH = make_batch([0, 1, 2])
LEVEL = 1e-4  # of a false alarm, seeds are fixed


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return [export_toy(0, folder), export_toy(1, folder, rounds=False)]


@pytest.fixture(scope="module")
def target(graphs):
    return graphs[0]


@pytest.mark.parametrize("name", ["extend", "ask", "denoiser", "speculative_round"])
def test_graphs_compute_what_pytorch_computes(target, name):
    module, spec = toy_modules(0)[name]
    reference, session = TorchSession(spec, module, torch.device("cpu")), getattr(target, name)
    for which in ("min", "opt"):
        sizes = spec.sizes(which)
        if "steps" in sizes:
            sizes["steps"] = SCHEDULE.num_steps
        inputs = spec.example_inputs(sizes, seed=1)
        if "schedule" in inputs:
            inputs["schedule"] = SCHEDULE.table
        got, expected = session(**inputs), reference(**inputs)
        for output in spec.outputs:
            if output.tolerance is not None:
                error = (got[output.name] - expected[output.name]).norm()
                assert error <= output.tolerance * expected[output.name].norm() + 1e-6, output.name


@pytest.mark.parametrize("width", [1, 4])
def test_target(target, width):
    model, sampler = target.model("target"), toy_sampler(width=width)
    canvas, counts = decode(Alone(sampler, model, CHANNELS), BATCH)
    assert counts.target_rounds == -(-LENGTH // width)
    assert canvas.sequence.tolist() == [list(range(LENGTH))] * len(BATCH)
    assert canvas.tokens.isfinite().all() and canvas.tokens.std() > 0.1
    # Tokens are read once, though each is seen in every later step; the last are not read.
    read = sampler.plan.boundaries[-2] if width > 1 else LENGTH - 1
    assert model.evaluated == 1 + len(BATCH) * read
    alone, _ = decode(Alone(sampler, target.model("target"), CHANNELS), make_batch([1]))
    torch.testing.assert_close(canvas.tokens[1], alone.tokens[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("verify", ["parallel", "prefix"])
def test_cspd_with_equal_models_is_the_target_under_prefix(target, verify):
    options = CspdOptions(gamma=4, prefill=0.1, verify=verify)
    pair = target.model("target"), target.model("draft")
    canvas, counts = decode(Speculative(toy_sampler(), *pair, options, CHANNELS), BATCH)
    assert canvas.done and canvas.tokens.isfinite().all()
    assert counts.verdicts.adds_up and counts.verdicts.proposed > 0
    if verify == "prefix":
        alone, _ = decode(Alone(toy_sampler(), target.model("target"), CHANNELS), BATCH)
        assert counts.verdicts.accepted == counts.verdicts.proposed
        torch.testing.assert_close(canvas.tokens, alone.tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("verify", ["parallel", "prefix"])
def test_cspd_replaces_what_another_draft_proposes(graphs, verify):
    """Samples part ways at their rejections: the caches follow."""
    options = CspdOptions(gamma=4, prefill=0.0, verify=verify, accept_temperature=3.0)
    target, draft = graphs[0].model("target"), graphs[1].model("draft")
    canvas, counts = decode(Speculative(toy_sampler(), target, draft, options, CHANNELS), BATCH)
    verdicts = counts.verdicts
    assert canvas.done and verdicts.adds_up
    assert 0 < verdicts.replaced_by_target and verdicts.fallback == 0
    assert (verdicts.discarded > 0) == (verify == "prefix")
    for row, image in enumerate(BATCH.images.tolist()):
        pair = graphs[0].model("target"), graphs[1].model("draft")
        alone, _ = decode(Speculative(toy_sampler(), *pair, options, CHANNELS), make_batch([image]))
        torch.testing.assert_close(canvas.tokens[row], alone.tokens[0], rtol=1e-4, atol=1e-4)


def test_lossless_with_one_row_is_stepping(target):
    images = [
        decode(Alone(toy_sampler(), target.model("target", window), CHANNELS), BATCH)[0].tokens
        for window in (None, 1)
    ]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


def test_lossless_saves_calls(target):
    rounds = []
    model = target.model("target", 6)
    speculative = model.head

    def counting(*arguments):
        sampled = speculative(*arguments)
        rounds.append(sampled.stats.rounds)
        return sampled

    model.head = counting
    canvas, _ = decode(Alone(toy_sampler(), model, CHANNELS), BATCH)
    assert canvas.tokens.isfinite().all() and len(rounds) == LENGTH
    assert sum(rounds) < 0.8 * LENGTH * SCHEDULE.num_steps


@pytest.mark.parametrize("window", [4, 12])
def test_lossless_keeps_the_distribution(window):
    """Against stepping with other numbers: 20 projections each, Bonferroni."""
    modules, count, cpu = toy_modules(0), 4000, torch.device("cpu")

    def session(name):
        module, spec = modules[name]
        axes = {n: a.model_copy(update={"max": 1 << 20}) for n, a in spec.axes.items()}
        return TorchSession(spec.model_copy(update={"axes": axes}), module, cpu)

    numbers = torch.arange(count)
    conditions = torch.randn(1, 1, CONFIG.embed_dim, generator=torch.Generator().manual_seed(3))
    rows = Rows(
        conditions.repeat(1, count, 1), torch.ones(count), torch.ones(count), numbers, numbers % 7
    )
    head = SpeculativeHead(session("speculative_round"), SpeculationOptions(window), CHANNELS)
    speculated = head(rows, SCHEDULE, Noise(1))
    stepped = StepHead(session("denoiser"))(rows, SCHEDULE, Noise(2), Purpose.DENOISE)
    accepted = speculated.stats.accepted.sum() / speculated.stats.tested.sum()
    assert 0.2 < accepted < 0.98  # drafts and their repairs have both been seen
    directions = torch.randn(CHANNELS, 20, generator=torch.Generator().manual_seed(4))
    pairs = zip(
        (speculated.sample @ directions).T.numpy(), (stepped.sample @ directions).T.numpy(),
        strict=True,
    )  # fmt: skip
    assert 20 * min(stats.ks_2samp(*pair).pvalue for pair in pairs) > LEVEL
