"""Bulk generation on Ray: whatever dies, and however many workers there are, the same bytes.

One Ray for the module, because starting it and its workers takes most of the time.
"""

import json
import os
import re
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from killed import contents

from cspd.engines.errors import CspdError
from cspd.runtime.commands import run
from cspd.runtime.commands.cli import main
from cspd.runtime.config import make_config
from cspd.runtime.scale.local_ray import local_ray
from cspd.runtime.scale.pool import Cluster, Machine, split_cpus
from cspd.runtime.scale.shipping import Shipment, unpack
from cspd.runtime.store.folder import RunFolder

ray = pytest.importorskip("ray", reason="the extra 'scale' is not installed")
grpc = pytest.importorskip("grpc", reason="the extra 'scale' is not installed")
CONFIG = make_config(
    labels=(1, 417), num_images=24, class_balanced=True, num_iter=4, head_steps=4, gamma=4,
    batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def our_folder():
    """Home folder and temporary folder of this module, with a short name for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="c") as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", folder)
            patch.setenv("HOME", folder)
            patch.setattr(tempfile, "tempdir", None)
            yield Path(folder)


@pytest.fixture(scope="module")
def our_ray(our_folder):
    """Ray on this machine, as a run starts it."""
    with local_ray("tests", num_cpus=3, object_store_memory=100 << 20):
        yield


def test_nobody_else_reaches_ray(our_ray, our_folder):
    """Its folder is closed, whatever Ray does inside; nothing of it lies in the home folder."""
    (around,) = our_folder.glob("cspd-ray-*")
    assert stat.S_IMODE(around.stat().st_mode) == 0o700 and around.stat().st_uid == os.getuid()
    sockets = [path for path in around.rglob("*") if path.is_socket()]
    assert sockets and not [path for path in our_folder.rglob("*") if path.name == ".ray"]
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


@pytest.mark.parametrize("token", ["ours", "x" * 64, None])
def test_a_stranger_is_refused(our_ray, token):
    """Ray's own port answers who knows the token, and nobody else."""
    token = os.environ["RAY_AUTH_TOKEN"] if token == "ours" else token
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        if token == os.environ["RAY_AUTH_TOKEN"]:
            assert b"127.0.0.1" in ask(b"", metadata=metadata, timeout=30)
            return
        with pytest.raises(grpc.RpcError) as caught:
            ask(b"", metadata=metadata, timeout=30)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def alone(tiny_bundle, tmp_path_factory):
    """The files of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run.generate(tiny_bundle, CONFIG, out, run.Job(Machine("cpu", 1), quiet=True))
    return contents(out, "run.json")


def on_ray(bundle, out, workers: int, *, quiet=True, **options) -> dict:
    job = run.Job(Machine("cpu", 1), cluster=Cluster("local", workers), quiet=quiet, **options)
    return run.generate(bundle, CONFIG, out, job)[0]


def test_workers_and_deaths(our_ray, tiny_bundle, alone, tmp_path, monkeypatch, capfd):
    """1, 2 and 3 workers, one of them killed in the middle: what one process writes.

    The death is told in a line of ours, with the images, and not in a paragraph of Ray's.
    """
    add, killed, processes = RunFolder.add, [], set()

    def add_and_kill(self, batch):
        add(self, batch)
        processes.add(batch.process)
        if killed == [] and len(self.lines) >= 4:
            killed.append(batch.process)
            os.kill(batch.process, signal.SIGKILL)

    monkeypatch.setattr(RunFolder, "add", add_and_kill)
    for workers in (1, 2, 3):
        killed.clear()
        processes.clear()
        record = on_ray(tiny_bundle, tmp_path / str(workers), workers, quiet=False)
        assert contents(tmp_path / str(workers), "run.json") == alone
        assert record["statistics"]["images"] == CONFIG.num_images
        assert record["session"]["workers"] == workers
        # The killed worker's images were made by another process.
        assert len(killed) == 1 and processes > set(killed)
    printed, said = capfd.readouterr()
    assert re.search(r"a worker died \(.+\); images \d+\.\.\d+ are made again", said)
    assert "(raylet)" not in printed + said


def test_stopped_and_gone_on_with(our_ray, tiny_bundle, alone, tmp_path, monkeypatch):
    """A signal lets what is in flight finish; one process may resume it."""
    add = RunFolder.add

    def add_and_stop(self, batch):
        add(self, batch)
        if len(self.lines) == CONFIG.batch_size:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add", add_and_stop)
        with pytest.raises(CspdError, match=r"images are safe.*stopped by SIGTERM") as caught:
            on_ray(tiny_bundle, tmp_path / "out", 1)
    assert caught.value.exit_code == 143
    record, _ = run.generate(
        tiny_bundle, CONFIG, tmp_path / "out", run.Job(Machine("cpu", 1), quiet=True)
    )
    assert 0 < record["session"]["images"] < CONFIG.num_images
    assert contents(tmp_path / "out", "run.json") == alone


def test_error_of_a_worker_is_one_line(our_ray, tiny_bundle, tmp_path):
    """CUDA is missing where the worker runs, not where the command was given."""
    job = run.Job(Machine("cpu", 1), cluster=Cluster("local", 1), quiet=True)
    config = CONFIG.model_copy(update={"backend": "tensorrt"})
    with pytest.raises(CspdError, match="tensorrt") as caught:
        run.generate(tiny_bundle, config, tmp_path / "out", job)
    assert "\n" not in str(caught.value)


def test_more_than_the_cluster_has(our_ray, tiny_bundle, tmp_path):
    job = run.Job(Machine("cpu", 2), cluster=Cluster("local", 2), quiet=True)
    with pytest.raises(CspdError, match=r"--workers 2 with 2 CPUs each do not fit.*have 3"):
        run.generate(tiny_bundle, CONFIG, tmp_path / "out", job)
    job = run.Job(Machine("cuda"), cluster=Cluster("local", 2), quiet=True)
    with pytest.raises(CspdError, match="--workers 2: the cluster has 0 GPUs"):
        run.generate(tiny_bundle, CONFIG, tmp_path / "out", job)


class Store:
    """What `unpack` needs of Ray: `get` of references, here the bytes themselves."""

    def __init__(self) -> None:
        self.reads = 0

    def get(self, piece: bytes) -> bytes:
        self.reads += 1
        return piece


def shipment_of(bundle) -> Shipment:
    paths = [bundle.folder / name for name in (*bundle.manifest.files, "manifest.json")]
    return Shipment(
        bundle.sha256,
        {str(path.relative_to(bundle.folder)): [path.read_bytes()] for path in paths},
    )


def test_bundle_is_unpacked_once_per_node_and_mended(tiny_bundle, tmp_path):
    store, shipment = Store(), shipment_of(tiny_bundle)
    bundle = unpack(store, shipment, tmp_path)
    assert bundle.sha256 == tiny_bundle.sha256 and bundle.folder.parent == tmp_path
    reads = store.reads
    assert reads == len(shipment.files)
    unpack(store, shipment, tmp_path)
    assert store.reads == reads
    (bundle.folder / "target/weights.safetensors").write_bytes(b"bad")
    unpack(store, shipment, tmp_path)
    assert store.reads == 2 * reads


def test_bundle_that_changed_on_its_way(tiny_bundle, tmp_path):
    shipment = shipment_of(tiny_bundle)
    shipment.files["draft/weights.safetensors"] = [b"x" * 100]
    with pytest.raises(CspdError, match=r"draft/weights.safetensors: differs from the hash"):
        unpack(Store(), shipment, tmp_path)


@pytest.mark.parametrize(
    ("nodes", "workers", "share"),
    [([8], 2, 4), ([8], 3, 2), ([8, 8], 3, 4), ([16, 4], 5, 4), ([2], 3, 1), ([2, 2], 1, 2)],
)
def test_cpus_are_split_so_that_every_worker_has_a_place(nodes, workers, share):
    assert split_cpus(nodes, workers) == share


WRONG = {
    "workers alone": (("--workers", "2"), 2, "--workers: changes nothing without --ray"),
    "baseline": (("--ray", "--baseline"), 2, "leave --ray out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(tiny_bundle, tmp_path, case):
    options, code, fragment = WRONG[case]
    arguments = ["generate", str(tiny_bundle.folder), "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code and fragment in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_missing_extra(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["generate", str(tiny_bundle.folder), "--out", str(tmp_path / "out"), "--ray"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "pip install 'cspd[scale]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_command_starts_its_own_ray(tiny_bundle, alone, tmp_path, our_folder, capfd):
    """With a new token, although this process had one before; and it is silent."""
    if ray.is_initialized():
        ray.shutdown()
    out = tmp_path / "out"
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in CONFIG.model_dump(include={"num_images", "num_iter", "gamma"}).items()
    ]
    result = CliRunner().invoke(
        main,
        [
            "generate", str(tiny_bundle.folder), "--labels", "1,417", "--class-balanced",
            *options, "--head-steps=4", "--cfg=1", "--batch-size=2", "--ray", "--workers=1",
            "--threads=1", "--json", "--out", str(out),
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["session"]["workers"] == 1
    assert not ray.is_initialized() and not list(our_folder.glob(".ray"))
    assert contents(out, "run.json") == alone
    assert "ray" not in "".join(capfd.readouterr()).lower()


def test_a_folder_whose_name_is_too_long_for_sockets(tiny_bundle, tmp_path, monkeypatch):
    if ray.is_initialized():
        ray.shutdown()
    (tmp_path / ("long" * 30)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 30)))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(CspdError, match="set TMPDIR to a folder with a short name"):
        on_ray(tiny_bundle, tmp_path / "out", 1)
