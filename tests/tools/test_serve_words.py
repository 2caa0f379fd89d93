"""What is said about a wrong request: the field, what it got, what it expected, the nearest."""

import pytest
from pydantic import ValidationError

pytest.importorskip("ray.serve", reason="needs the extra scale")

from cspd.engines.bundle import open_bundle
from cspd.engines.errors import BundleError, CspdError, NonFiniteError
from cspd.runtime.cli import shipped_bundle
from cspd.tools.serve_bundle import bounds, configuration, describe
from cspd.tools.serve_limits import Admission, Refusal
from cspd.tools.serve_models import ImageRequest, Settings
from cspd.tools.serve_service import refuse
from cspd.tools.serve_words import explain, near, of_request

# By a field: a wrong value, and what must be said of it.
WRONG = {
    "label": (None, "label is null, expected the number or the name of a class"),
    "n": (17, "n is 17, expected 1..16"),
    "method": ("cpsd", "one of target, cspd, lossless, draft; did you mean 'cspd'?"),
    "seed": (-1, "seed is -1, expected 0..18446744073709551615"),
    "num_iter": (0, "num_iter is 0, expected 1..49"),
    "head_steps": (1.5, "head_steps is 1.5, expected a whole number"),
    "cfg": (float("nan"), "cfg is NaN, expected 0..100"),
    "cfg_schedule": ("lin", "expected one of linear, constant; did you mean 'linear'?"),
    "temperature": (0, "temperature is 0, expected more than 0 and at most 10"),
    "gamma": ("8", "gamma is '8', expected a whole number"),
    "prefill": (2, "prefill is 2, expected 0..1"),
    "accept_temperature": (-1.0, "expected more than 0 and at most 1000"),
    "verify": ("xyz", "verify is 'xyz', expected one of parallel, prefix"),
    "align": ("yes", "align is 'yes', expected true or false"),
    "on_reject": ("residuals", "did you mean 'residual'?"),
    "residual_temperature": (0, "expected more than 0 and at most 1000"),
    "count_in": ("step", "did you mean 'steps'?"),
    "as_released": ("yes", "as_released is 'yes', expected true or false"),
    "window": (65, "window is 65, expected 1..32"),
}


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(shipped_bundle())


def said(body, bundle):
    with pytest.raises(ValidationError) as caught:
        ImageRequest.model_validate(body)
    return explain(caught.value.errors()[0], bounds(bundle))


def test_every_field_has_words(bundle):
    assert set(WRONG) == set(ImageRequest.model_fields)


@pytest.mark.parametrize("field", WRONG)
def test_wrong_value(bundle, field):
    value, fragment = WRONG[field]
    problem = said({"label": 1, field: value}, bundle)
    assert problem.field == field and problem.message.startswith(f"{field} is ")
    assert fragment in problem.message


def test_a_deep_value_is_not_repeated(bundle):
    deep = []
    for _ in range(10**5):
        deep = [deep]
    message = explain({"type": "x", "loc": ("body", "n"), "input": deep}, bounds(bundle)).message
    assert message == "n is a list, expected a whole number"


def test_a_missing_or_unknown_field(bundle):
    assert said({}, bundle).field == "label"
    unknown = said({"label": 1, "num_iters": 2}, bundle)
    assert unknown.message == "there is no field 'num_iters'; did you mean 'num_iter'?"


def test_bounds_are_those_of_the_bundle(bundle):
    """The largest values run; one more is refused with the same bound, before any engine."""
    settings, found = Settings(bundle=bundle.folder), describe(bundle, Settings(bundle=".")).bounds
    geometry = bundle.manifest.geometry
    assert found["num_iter"].max == found["gamma"].max == geometry.num_tokens
    assert found["label"].max == geometry.num_classes - 1
    assert found["window"].max == 32  # the shipped pair was built for it
    for field, method in (("num_iter", "target"), ("gamma", "cspd"), ("window", "lossless")):
        most = int(found[field].max)
        request = ImageRequest(label=1, method=method, **{field: most})
        assert getattr(configuration(request, bundle, settings), field) == most
        with pytest.raises(CspdError, match=f"is {most + 1}, expected 1..{most}"):
            beyond = request.model_copy(update={field: most + 1})
            configuration(beyond, bundle, settings)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("snekers", "; did you mean 'sneaker'?"), ("SNEAKER", "; did you mean 'sneaker'?"),
     ("pull", "; did you mean 'pullover'?"), ("/etc/passwd", "; GET /v1/models lists")],
)  # fmt: skip
def test_the_nearest_class_is_named(bundle, name, hint):
    with pytest.raises(CspdError) as caught:
        configuration(ImageRequest(label=name), bundle, Settings(bundle=bundle.folder))
    assert f"no class {name!r}{hint}" in str(caught.value)


def test_nothing_is_suggested_for_what_is_like_nothing():
    assert near("", ["cspd"]) == near("/etc/passwd", ["cspd", "target"]) == ""


def test_options_become_fields():
    problem = of_request(CspdError("--num-images is 0; use --method target or --max-batch 8"))
    assert problem.field == "n"
    assert problem.message == "n is 0; use method target or --max-batch 8"


class Wrapped(Exception):
    """As Ray wraps what an engine raised."""

    def __init__(self, cause):
        self.cause = cause


@pytest.mark.parametrize("wrap", [lambda error: error, Wrapped])
def test_what_an_engine_says_of_a_request_is_its_answer(wrap):
    for error in (CspdError("--window is 64, expected 1..32"), NonFiniteError("NaN in image 0")):
        with pytest.raises(Refusal) as caught:
            refuse(wrap(error))
        assert caught.value.status == 422 and "--" not in caught.value.message


def test_a_broken_bundle_stays_our_fault():
    for error in (BundleError("damaged"), ValueError("bug")):
        with pytest.raises(type(error)):
            refuse(error)


def test_a_closed_server_admits_nothing():
    admission = Admission(4)
    with admission.admit(1):
        admission.closed = True
        with pytest.raises(Refusal) as caught:
            admission.check(1)
        assert admission.images == 1
    assert caught.value.status == 503 and int(caught.value.headers["Retry-After"]) > 0
