"""The report of this machine; of other machines, it is computed from checks."""

import json
import subprocess
import sys

import pytest
import torch

from cspd.engines import doctor
from cspd.engines.doctor import Check, Diagnosis, Gpu, diagnose

RTX_4090 = Gpu(name="NVIDIA GeForce RTX 4090", capability="8.9", memory_bytes=24 << 30)
H200 = Gpu(name="NVIDIA H200", capability="9.0", memory_bytes=140 << 30)


def with_gpus(*gpus: Gpu) -> dict[str, Check]:
    checks = {check.subject: check for check in diagnose().checks}
    return {**checks, "gpu": doctor._gpu_check(gpus)}


def test_this_machine():
    found = diagnose()
    subjects = {check.subject: check for check in found.checks}
    assert subjects["python"].ok
    assert subjects["torch"].found.startswith(torch.__version__)
    assert subjects["gpu"].ok == torch.cuda.is_available()
    assert found.runs("torch")
    assert not found.runs("no such backend")


def test_every_failing_line_says_what_mends_it():
    found = diagnose()
    assert all(check.fix for check in found.checks if not check.ok)
    assert all(backend.fix for backend in found.backends if not backend.runs)


def test_json_round_trip():
    text = diagnose().model_dump_json()
    assert json.loads(text)["schema_version"] == 1
    assert Diagnosis.model_validate_json(text).model_dump_json() == text


def test_rtx_builds_without_a_gpu_and_runs_on_the_gpus_it_targets():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    none = doctor._backend("tensorrt-rtx", with_gpus(), ())
    assert (none.builds, none.runs) == (True, False)
    ada = doctor._backend("tensorrt-rtx", with_gpus(RTX_4090), (RTX_4090,))
    assert (ada.builds, ada.runs) == (True, True)
    hopper = doctor._backend("tensorrt-rtx", with_gpus(H200), (H200,))
    assert (hopper.builds, hopper.runs) == (True, False)
    assert "NVIDIA H200 (9.0) is none of 7.5" in hopper.reason


def test_tensorrt_builds_and_runs_only_on_a_gpu():
    installed = Check(subject="tensorrt", found="11.4", ok=True)
    checks = {**with_gpus(), "tensorrt": installed}
    assert not doctor._backend("tensorrt", checks, ()).builds
    checks = {
        **with_gpus(),
        "tensorrt": Check(subject="tensorrt", found="missing", ok=False, fix="m"),
    }
    assert doctor._backend("tensorrt", checks, ()).fix == "m"


def test_a_library_that_breaks_is_a_finding():
    def broken() -> Check:
        raise OSError("libnvinfer.so.10: cannot open shared object file\nsecond line")

    check = doctor._guard("tensorrt", broken)
    assert not check.ok
    assert check.found == "OSError: libnvinfer.so.10: cannot open shared object file"
    assert check.fix


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    check = doctor._guard("onnxruntime", doctor._onnxruntime)
    assert (check.ok, check.fix) == (False, "pip install 'cspd[cpu]'")


def test_driver_version_from_the_kernel_and_from_the_tool(monkeypatch, tmp_path):
    kernel = tmp_path / "version"
    kernel.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\n")
    monkeypatch.setattr(doctor, "DRIVER_FILE", kernel)
    assert doctor._driver_version() == "570.86.15"
    monkeypatch.setattr(doctor, "DRIVER_FILE", tmp_path / "none")
    answer = subprocess.CompletedProcess([], 0, stdout="580.1\n580.1\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: answer)
    assert doctor._driver_version() == "580.1"


def test_no_tensorrt_is_imported_with_the_engines():
    code = (
        "import sys, cspd.engines.doctor, cspd.engines.lint, cspd.engines.trt.build,"
        "cspd.engines.trt.session, cspd.engines.sessions.cuda_graph;"
        "heavy = ('tensorrt', 'tensorrt_rtx', 'onnx', 'onnxruntime');"
        "sys.exit(any(name in sys.modules for name in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_onnxruntimes_over_each_other_are_a_finding(tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.30.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.30.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = next(c for c in diagnose().checks if c.subject == "onnxruntime")
    assert not check.ok
    assert check.found == "onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0 are installed over each " \
        "other; keep one"  # fmt: skip
    assert check.fix == "pip uninstall --yes onnxruntime onnxruntime-gpu && " \
        "pip install onnxruntime-gpu"  # fmt: skip
