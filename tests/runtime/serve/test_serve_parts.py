"""Parts of the server without Ray: grouping, cancelling, keys, noise of mixed rows."""

import asyncio
import shutil
import socket

import pytest
import torch
from click.testing import CliRunner

from cspd.engines.bundle import Bundle, open_bundle
from cspd.engines.errors import CspdError
from cspd.runtime.about import OF_CSPD
from cspd.runtime.commands.cli import main, shipped_bundle
from cspd.runtime.config import AS_RELEASED, RunConfig, about, make_config
from cspd.runtime.decode.canvas import ACCEPTED, REJECTED, Canvas
from cspd.runtime.noise import Noise, Purpose, RowNoise
from cspd.runtime.pipeline import ImageId
from cspd.runtime.serve.batch import BatchQueue, Ticket, group_key
from cspd.runtime.serve.bundle import configuration
from cspd.runtime.serve.command import is_loopback, read_key
from cspd.runtime.serve.models import ImageRequest, Settings


def config(**values):
    return make_config(**{"labels": (1,), "num_images": 1, "method": "target", **values})


def ticket(**values) -> Ticket:
    made = config(**values)
    return Ticket(made, ImageId(made.seed, 0, made.labels[0]), group_key(made), 0.0)


def test_row_noise_gives_each_row_the_numbers_of_its_image():
    seeds, images = [7, 2**63 + 5, 7], [4, 0, 2**32 - 1]
    rows, positions, steps = torch.arange(3), torch.tensor([0, 9, 48]), torch.tensor([0, 1, 99])
    mixed = RowNoise(seeds, images)
    for row, (seed, image) in enumerate(zip(seeds, images, strict=True)):
        alone, one = Noise(seed), slice(row, row + 1)
        index = torch.tensor([image])
        for purpose in (Purpose.DENOISE, Purpose.ACCEPT):
            expected = alone.normal(purpose, index, positions[one], steps[one], 16)
            got = mixed.normal(purpose, rows, positions, steps, 16)[one]
            assert torch.equal(got, expected)
        assert torch.equal(mixed.orders(rows, 49)[row], alone.orders(index, 49)[0])
        start, chain = mixed.chain(Purpose.DENOISE, rows, positions, 5, 16)
        alone_start, alone_chain = alone.chain(Purpose.DENOISE, index, positions[one], 5, 16)
        assert torch.equal(start[one], alone_start) and torch.equal(chain[:, one], alone_chain)


def test_fates_are_noted_where_the_tokens_lie():
    canvas = Canvas(torch.zeros(2, 4, 1), torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]]), [1, 0])
    span = canvas.span([1, 0], [3, 1])
    yes = torch.tensor([[True, False], [False, False]])
    no = torch.tensor([[False, True], [True, False]])
    canvas.judge(span, yes, no)
    assert canvas.fates.tolist() == [[ACCEPTED, 0, 0, REJECTED], [0, REJECTED, 0, 0]]


def test_groups_hold_what_differs_in_seed_and_class_only():
    batches = []

    async def run(tickets):
        batches.append([t.image.seed for t in tickets])
        for each in tickets:
            each.events.put_nowait(("done", each.image.seed))

    async def scenario():
        queue = BatchQueue(3, run)
        tickets = [
            ticket(seed=0), ticket(seed=1, cfg=2.0), ticket(seed=2, labels=(5,)), ticket(seed=3),
            ticket(seed=4), ticket(seed=5, cfg=2.0),
        ]  # fmt: skip
        queue.put(tickets)
        assert [await t.result() for t in tickets] == [0, 1, 2, 3, 4, 5]

    asyncio.run(scenario())
    assert batches == [[0, 2, 3], [1, 5], [4]]


def test_cancelled_images_are_never_started():
    started = []

    async def run(tickets):
        started.extend(t.image.seed for t in tickets)
        for each in tickets:
            each.events.put_nowait(("done", None))

    async def scenario():
        queue = BatchQueue(2, run)
        tickets = [ticket(seed=seed) for seed in range(4)]
        queue.put(tickets)
        queue.drop(tickets[:3])
        await tickets[3].result()
        assert len(queue) == 0

    asyncio.run(scenario())
    assert started == [3]


def test_a_failed_batch_fails_its_images_and_no_others():
    async def run(tickets):
        if tickets[0].image.seed == 0:
            raise CspdError("broken")
        tickets[0].events.put_nowait(("done", "fine"))

    async def scenario():
        queue = BatchQueue(1, run)
        bad, good = ticket(seed=0), ticket(seed=1)
        queue.put([bad, good])
        with pytest.raises(CspdError, match="broken"):
            await bad.result()
        assert await good.result() == "fine"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_is_loopback(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("text", ["", "short", "with a space in the middle of it", "ключ" * 8])
def test_bad_key(tmp_path, text):
    (tmp_path / "key").write_text(text)
    with pytest.raises(CspdError, match="expected at least 16 ASCII"):
        read_key(tmp_path / "key", "127.0.0.1")


def test_no_server_beyond_loopback_without_a_key(tmp_path):
    result = CliRunner().invoke(main, ["serve", "--host", "0.0.0.0"])
    assert result.exit_code == 2
    assert "a key is needed" in result.output and "--api-key-file" in result.output
    missing = ["serve", "--host", "0.0.0.0", "--api-key-file", str(tmp_path / "none")]
    result = CliRunner().invoke(main, missing)
    assert result.exit_code == 1 and "cannot be read" in result.output


def test_a_damaged_bundle_or_a_taken_port_is_refused_before_anything_starts(tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(shipped_bundle(), bundle)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", str(bundle), "--port", port])
    assert result.exit_code == 1 and "choose another --port" in result.output
    with (bundle / "draft" / "weights.safetensors").open("r+b") as file:
        file.write(b"\0" * 8)
    result = CliRunner().invoke(main, ["serve", str(bundle)])
    assert result.exit_code == 1 and "differs from the hash" in result.output


@pytest.fixture(scope="module")
def configured():
    """What a request to a server of the shipped pair asks for."""
    bundle = open_bundle(shipped_bundle())
    settings = Settings(bundle=shipped_bundle())
    return lambda **fields: configuration(ImageRequest(label=1, **fields), bundle, settings)


def test_options_of_cspd_are_those_of_the_command_line(configured):
    """Every one has a field and an option, and reaches the run."""
    options = {parameter.name for parameter in main.commands["generate"].params}
    told = {name: about(name) for name in RunConfig.model_fields}
    of_cspd = {name for name, found in told.items() if found and found.needs[:1] == OF_CSPD}
    assert len(of_cspd) == 8 and options >= {*of_cspd, "as_released"}
    assert of_cspd <= set(ImageRequest.model_fields)
    made = configured(on_reject="residual", residual_temperature=42.0, count_in="steps")
    assert (made.residual_temperature, made.count_in) == (42.0, "steps")
    released = configured(as_released=True)
    assert released.model_dump(include=set(AS_RELEASED)) == AS_RELEASED
    assert configured(as_released=False) == configured()


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"method": "target", "gamma": 4}, 'gamma 4 changes nothing with method "target"'),
        ({"method": "draft", "as_released": True}, 'as_released true means method "cspd"'),
        ({"residual_temperature": 1.0}, 'add on_reject "residual"'),
        ({"method": "target", "window": 4}, 'leave it out, or add method "lossless"'),
        ({"cfg": 1.0, "cfg_schedule": "constant"}, 'cfg_schedule "constant" changes nothing'),
    ],
)
def test_request_with_an_option_that_changes_nothing_is_refused(configured, fields, fragment):
    with pytest.raises(CspdError, match=fragment):
        configured(**fields)


@pytest.mark.parametrize("default", [{"method": "auto"}, {"method": "target", "head": "auto"}])
def test_no_request_waits_for_a_measurement(default):
    """Neither where the bundle's own default is a choice by costs."""
    bundle = open_bundle(shipped_bundle())
    manifest = bundle.manifest.model_copy(update={"defaults": {"num_iter": 8, **default}})
    config = configuration(
        ImageRequest(label=1), Bundle(bundle.folder, manifest), Settings(bundle=bundle.folder)
    )
    assert (config.head_mode, config.window) == ("lossless", 8)
    named = ImageRequest(label=1, method="target", num_iter=8)
    assert configuration(named, bundle, Settings(bundle=bundle.folder)).head_mode == "plain"
