"""What is said about a wrong request: the field, what it got, what it expected, the nearest."""

import itertools
import re

import pytest
from pydantic import ValidationError

pytest.importorskip("ray.serve", reason="needs the extra scale")

from cspd.engines.bundle import open_bundle
from cspd.engines.errors import BundleError, CspdError, NonFiniteError, overflow_advice
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.serve.bundle import bounds, configuration, describe
from cspd.runtime.serve.limits import Admission, Refusal
from cspd.runtime.serve.models import ImageRequest, Settings
from cspd.runtime.serve.service import refuse
from cspd.runtime.serve.words import explain, near, of_request

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


ODD = (True, "x" * 200, "", 1.5, -1, 10**30, float("nan"), float("inf"), [], [1], {}, {"a": 1})


@pytest.mark.parametrize("field", WRONG)
def test_every_field_with_every_kind_of_value(bundle, field):
    """Refused in words that begin with the field, or taken."""
    for value in ODD:
        try:
            request = ImageRequest.model_validate({"label": 1, field: value})
            configuration(request, bundle, Settings(bundle=bundle.folder))
        except ValidationError as error:
            problem = explain(error.errors()[0], bounds(bundle))
        except CspdError as error:
            problem = of_request(error)
        else:
            continue
        assert problem.field == field
        assert re.match(rf"{field}(:| is | \S+ changes )", problem.message)
        assert "--" not in problem.message and len(problem.message) < 300


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


@pytest.mark.parametrize(
    ("words", "field", "message"),
    [
        ("--num-images is 0; use --method target or --max-batch 8", "n", "n is 0"),
        ("--window is 64, expected 1..32", "window", "window is 64, expected 1..32"),
        ("draft: NaN in image 3. Lower --cfg; cspd-export build helps", None,
         "draft: NaN in image 3. Lower cfg"),
        ("--backend torch: PyTorch sees no GPU", None,
         "this server cannot do what the request asks for"),
    ],
)  # fmt: skip
def test_options_become_fields_and_commands_are_left_out(words, field, message):
    problem = of_request(CspdError(words))
    assert (problem.field, problem.message) == (field, message)


# Valid by themselves: every value of a choice, the ends of every bound and beyond, names.
VALUES = {
    "label": (0, 9, 10, 10**6, "bag", "bags"), "n": (1, 16), "seed": (0, 2**64 - 1),
    "method": ("target", "cspd", "lossless", "draft"), "num_iter": (1, 49, 50, 4096),
    "head_steps": (2, 951, 952, 1000), "cfg": (0.0, 1.0, 100.0),
    "cfg_schedule": ("linear", "constant"), "temperature": (0.1, 10.0),
    "gamma": (1, 49, 50, 4096), "prefill": (0.0, 1.0), "accept_temperature": (0.1, 1000.0),
    "verify": ("parallel", "prefix"), "align": (True, False),
    "on_reject": ("target", "residual"), "residual_temperature": (0.1, 1000.0),
    "count_in": ("tokens", "steps"), "as_released": (True, False), "window": (1, 32, 33, 64),
}  # fmt: skip


def test_every_field_is_tried():
    assert set(VALUES) == set(ImageRequest.model_fields)


@pytest.mark.parametrize("field", VALUES)
def test_what_a_bundle_refuses_is_said_in_fields(bundle, field):
    """With every method, and beside what contradicts it: no option, no command, the field first."""
    settings = Settings(bundle=bundle.folder)
    others = [{}, {"as_released": True}, {"cfg": 1.0}, *({"method": m} for m in VALUES["method"])]
    for value, other in itertools.product(VALUES[field], others):
        body = {"label": 1, **other, field: value}
        try:
            configuration(ImageRequest(**body), bundle, settings)
        except CspdError as error:
            problem = of_request(error)
            assert problem.message == str(error)  # nothing had to be left out
            assert problem.field in body and problem.message.startswith(problem.field)
            assert "--" not in problem.message and "cspd-" not in problem.message


class Wrapped(Exception):
    """As Ray wraps what an engine raised."""

    def __init__(self, cause):
        self.cause = cause


@pytest.mark.parametrize("wrap", [lambda error: error, Wrapped])
def test_what_an_engine_says_of_a_request_is_its_answer(wrap):
    broken = NonFiniteError(f"NaN in image 0. {overflow_advice()}")
    for error in (CspdError("--window is 64, expected 1..32"), broken):
        with pytest.raises(Refusal) as caught:
            refuse(wrap(error))
        message = caught.value.message
        assert caught.value.status == 422 and "--" not in message and "cspd-" not in message


def test_a_client_is_told_what_it_can_do_about_nan():
    problem = of_request(NonFiniteError(f"NaN in image 0; nothing was saved. {overflow_advice()}"))
    assert problem.message == "NaN in image 0; nothing was saved. Lower cfg or temperature"


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
