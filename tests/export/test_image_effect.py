"""A small bundle in fp16: what its precision does to a whole image stands in the manifest."""

from click.testing import CliRunner
from tiny_pair import draft_state, tiny_plan

from cspd.export.cli import main
from cspd.export.graphs.networks import EXACT
from cspd.export.image_effect import with_image_effects


def test_the_manifest_holds_the_effect_on_every_graph_and_on_an_image(hoisted_bundle):
    model = hoisted_bundle.manifest.models["target"]
    for name, graph in model.graphs.items():
        # Half precision has 11 bits; what computes in float32 has none of that error.
        assert (graph.measured_error > 2.0**-16) == (name not in EXACT)
    effect = model.image_effect
    assert 2.0**-16 < effect.tokens_error < 0.2
    assert 20 < effect.psnr < 99
    assert (effect.num_iter, effect.head_steps, effect.measured_by) == (2, 10, "onnxruntime")


def test_only_the_denoiser_in_half_precision_is_spared_the_first_step(hoisted_bundle):
    graphs = hoisted_bundle.manifest.models["target"].graphs
    steps = {n: {t.name: t for t in g.spec.inputs}.get("step") for n, g in graphs.items()}
    assert steps["denoiser"].spares_last
    assert not steps["denoiser_first"].spares_last
    sizes = {"rows": 200, "branches": 2, "tokens": 3, "steps": 4}
    spared = graphs["denoiser"].spec.example_inputs(sizes)["step"]
    assert set(spared.tolist()) == {0, 1, 2}
    full = graphs["denoiser_first"].spec.example_inputs(sizes)["step"]
    assert set(full.tolist()) == {0, 1, 2, 3}


def test_inspect_shows_it(hoisted_bundle):
    result = CliRunner().invoke(main, ["inspect", str(hoisted_bundle.folder)])
    assert result.exit_code == 0, result.output
    effect = hoisted_bundle.manifest.models["target"].image_effect
    line = f"whole image: tokens differ from fp32 by {effect.tokens_error:.1e}"
    assert line in " ".join(result.output.split())


def test_float32_has_next_to_no_effect_and_other_weights_have_much(tiny_bundle):
    """The measurement itself: ONNX Runtime against the same weights, and against the draft's."""
    states = {role: source.weights for role, source in tiny_plan().models.items()}
    own = with_image_effects(tiny_bundle, states, None).models
    assert all(model.image_effect.tokens_error < 1e-4 for model in own.values())
    assert all(model.image_effect.psnr > 60 for model in own.values())
    swapped = with_image_effects(tiny_bundle, {**states, "target": draft_state}, None).models
    assert swapped["target"].image_effect.tokens_error > 1e-3


def test_the_head_counts_where_its_loop_is_one_graph(tiny_bundle):
    """It was compared with itself there: the loop came from the bundle on both sides."""
    states = {role: source.weights for role, source in tiny_plan().models.items()}

    def other_head():
        return {
            name: 1.5 * tensor if name.startswith("diffloss.net.final_layer") else tensor
            for name, tensor in states["target"]().items()
        }

    assert "denoiser_loop" in tiny_bundle.manifest.models["target"].graphs
    found = with_image_effects(tiny_bundle, {**states, "target": other_head}, None).models
    assert found["target"].image_effect.tokens_error > 1e-3
