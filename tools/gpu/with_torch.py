"""What PyTorch does on the GPU of this machine: the same images as on the CPU, and how fast.

The part of `gpu_check` that needs nothing but torch. Models of published sizes have random weights
and the shipped pair's acceptance, by denoising step: SYNTHETIC, for time and memory only.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.schedule import make_schedule
from cspd.engines.sessions.cuda_graph import Graphs, relative_error
from cspd.runtime.config import RunConfig, make_config
from cspd.runtime.costs.measure import Examples
from cspd.runtime.decode.alone import Alone
from cspd.runtime.decode.canvas import Batch
from cspd.runtime.decode.member import Member
from cspd.runtime.decode.setup import make_batch, make_sampler
from cspd.runtime.heads.base import Head
from cspd.runtime.heads.numbers import ChainNumbers
from cspd.runtime.heads.open_heads import OpenHeads
from cspd.runtime.heads.speculation import SpeculationOptions, SpeculativeSample
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.noise_table import TabledNoise
from cspd.runtime.pipeline import Pipeline, own_stream
from cspd.runtime.sessions import Sessions
from cspd.tools.bench.replay_numbers import ReplayNumbers
from cspd.tools.bench.run import peak_memory, reset_peak_memory
from cspd.tools.gpu.synthetic_pair import SyntheticPair

Found = dict[str, Any]
WAYS: dict[str, Found] = {
    "target": {"method": "target"},
    "draft": {"method": "draft"},
    "cspd": {"method": "cspd"},
    "cspd prefix": {"method": "cspd", "verify": "prefix", "head_steps": 10},
    "lossless": {"method": "lossless", "window": 8},
}
WINDOW = 16
REPEATS = 20
SERVED = 40
AR_STEPS, EAGER_STEPS = 64, 6
RECORDED = 96  # tokens whose acceptance is recorded


def versions() -> Found:
    """Software, card and modes that figures depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "torch": torch.__version__, "cuda": torch.version.cuda, "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }  # fmt: skip


def noise_is_the_same() -> Found:
    """Random numbers of the GPU against those of the CPU."""
    images, positions = torch.arange(64), torch.arange(64)
    cpu, gpu = Noise(2**40 + 3), Noise(2**40 + 3, "cuda")
    where = images.cuda(), positions.cuda()
    normal = cpu.chain(Purpose.DENOISE, images, positions, 100, 16)[1]
    found = gpu.chain(Purpose.DENOISE, *where, 100, 16)[1].cpu()
    tests = cpu.tests(Purpose.SPECULATE_TEST, images, positions, 100)
    uniform = gpu.tests(Purpose.SPECULATE_TEST, *where, 100).cpu()
    orders = torch.equal(cpu.orders(images, 256), gpu.orders(images.cuda(), 256).cpu())
    off = float((normal - found).abs().max())
    equal = bool(torch.equal(tests, uniform))
    return {
        "ok": orders and equal and off < 1e-5,
        "orders": orders,
        "uniform": equal,
        "normal": off,
    }


def config_of(bundle: Bundle, **options: Any) -> RunConfig:
    """A run of `bundle` in PyTorch."""
    labels = tuple(range(bundle.manifest.geometry.num_classes))
    values = {**bundle.manifest.defaults, "backend": "torch", "labels": labels, **options}
    return make_config(**values)


def shipped_images(bundle: Bundle, images: int = 4, num_iter: int = 8) -> Found:
    """Every method with trained weights: images of the GPU against those of the CPU."""
    results: Found = {"ok": True}
    gpu, cpu = (Pipeline(Sessions(bundle, "torch", d, threads=4)) for d in ("cuda", "cpu"))
    for name, options in WAYS.items():
        config = config_of(
            bundle, num_images=images, batch_size=images, num_iter=num_iter, **options
        )
        expected, counted, seconds = run(cpu, config)
        found, counts, first = run(gpu, config)
        again, _, second = run(gpu, config)
        difference = np.abs(found.astype(int) - expected.astype(int))
        off, same = float(np.mean(difference > 2)), bool(np.array_equal(found, again))
        results[name] = {
            "ok": same and off < 0.02, "pixels_off": off, "same_again": same,
            "largest_difference": int(difference.max()),
            "target_calls": [counts.target_calls, counted.target_calls],
            "first_seconds": first, "second_seconds": second, "cpu_seconds": seconds,
        }  # fmt: skip
        results["ok"] &= results[name]["ok"]
    results["captures"] = {name: asdict(s) for name, s in gpu.heads.captures.items()}
    results["notes"] = gpu.sessions.notes
    return results


def shipped_speed(bundle: Bundle, images: int = 8) -> Found:
    """Seconds of a batch of whole images by every method, captured and not."""
    results: Found = {}
    for record in (True, False):
        pipeline = Pipeline(Sessions(bundle, "torch", "cuda"), record=record)
        for name in ("target", "lossless", "cspd"):
            config = config_of(bundle, num_images=images, batch_size=images, **WAYS[name])
            times = [run(pipeline, config)[2] for _ in range(3 if record else 2)]
            results[f"{name}, {'captured' if record else 'eager'}"] = times
    return results


def run(pipeline: Pipeline, config: RunConfig) -> tuple[np.ndarray, Any, float]:
    """Pixels and statistics of one batch, and its time, the transfer of the pixels included."""
    start = time.perf_counter()
    images, counts = next(pipeline.generate(config))
    return np.stack([i.pixels for i in images]), counts, round(time.perf_counter() - start, 4)


def both_devices(bundle: Bundle) -> Found:
    """A session on the CPU works after one on the GPU was opened, and the other way round."""
    results = {}
    for label in ("target/backbone", "target/denoiser", "decoder"):
        sessions = [Sessions(bundle, "torch", device)(label) for device in ("cpu", "cuda", "cpu")]
        inputs = sessions[0].spec.example_inputs(sessions[0].spec.sizes("opt"), seed=1)
        outputs = [s(**{n: t.to(s.device) for n, t in inputs.items()}) for s in sessions]
        name = sessions[0].spec.outputs[0].name
        results[label] = relative_error(outputs[1][name].cpu(), outputs[2][name])
    return {"ok": max(results.values()) < 1e-4, "relative_error": results}


def served(bundle: Bundle) -> Found:
    """GPU memory over many requests of changing size."""
    pipeline, held = Pipeline(Sessions(bundle, "torch", "cuda")), []
    for number in range(SERVED):
        size = (1, 3, 8)[number % 3]
        options = {"method": "lossless", "window": 8, "seed": number}
        run(pipeline, config_of(bundle, num_images=size, batch_size=size, **options))
        held.append(torch.cuda.memory_reserved())
    grown = held[-1] - held[SERVED // 2]
    return {"ok": grown <= 0, "reserved_bytes": held[:: SERVED // 8], "grown_bytes": grown}


def recorded_acceptance(bundle: Bundle) -> np.ndarray:
    """Share of drafts that pass in the head of the shipped target, by denoising step [S]."""
    heads = OpenHeads(Sessions(bundle, "torch", "cuda"))
    config = config_of(bundle, method="lossless", num_images=1)
    rows = Examples.of(heads, "target", config)(RECORDED)
    schedule = make_schedule(bundle.manifest.schedule, 100).to("cuda")
    head = heads.speculative("target", SpeculationOptions(WINDOW, max_rows=4096))
    sampled = head(rows, schedule, Noise(0, "cuda"), Purpose.DENOISE)
    assert isinstance(sampled, SpeculativeSample)
    stats = sampled.stats
    return (stats.accepted + 0.5) / (stats.tested + 1)


class Synthetic:
    """A pair of published sizes on the GPU, and what one batch of its images takes."""

    def __init__(
        self, presets: dict[str, str], precision: str, acceptance: np.ndarray, *, compiled: bool,
        device: str = "cuda", graphs: Graphs | None = None,
    ) -> None:  # fmt: skip
        start = time.perf_counter()
        self.pair = SyntheticPair(presets, precision, torch.device(device), 128, compiled)
        self.device, self.graphs = device, graphs
        self.seconds = time.perf_counter() - start
        self.bundle, self.precision = self.pair.bundle, precision
        self.rates = torch.from_numpy(acceptance).float().to(device)

    def heads(self, *, record: bool) -> OpenHeads:
        """New heads over the same weights."""
        sessions = Sessions(self.bundle, "torch", self.device, opener=self.pair.open)
        return OpenHeads(sessions, self.graphs, record)

    def speculative(self, heads: OpenHeads, role: str) -> Head:
        """The lossless head with replayed acceptance."""

        def numbers(noise: Noise, purpose: Purpose) -> ChainNumbers:
            return ReplayNumbers(noise, purpose, self.rates)

        return heads.speculative(role, SpeculationOptions(WINDOW, max_rows=4096), numbers=numbers)

    def ways(self, role: str) -> dict[str, tuple[OpenHeads, Head]]:
        """Eager PyTorch, captured stepping, captured rounds."""
        eager, captured = self.heads(record=False), self.heads(record=True)
        return {
            "eager": (eager, eager.plain(role)),
            "captured": (captured, captured.plain(role)),
            "lossless": (captured, self.speculative(captured, role)),
        }

    def measure(self, role: str, batch: int, *, repeats: int = 3) -> Found:
        """Milliseconds of an autoregressive step by way, interleaved, after one image of each.

        Of whole images; eager ones are given up after `EAGER_STEPS`.
        """
        ways = self.ways(role)
        times: dict[str, list[float]] = {name: [] for name in ways}
        waits: dict[str, float] = {}
        reset_peak_memory(self.device)
        for repeat in range(repeats + 1):
            for name, (heads, head) in ways.items():
                steps = EAGER_STEPS if name == "eager" else AR_STEPS
                if repeat == 1:
                    with counted_waits() as count:
                        self.image(heads, head, role, batch, steps)
                    waits[name] = count[0] / steps
                elif repeat < 3 or name != "eager":
                    times[name].append(self.image(heads, head, role, batch, steps) / steps)
        found: Found = {
            "precision": self.precision, "batch": batch, "ways": {},
            "peak_memory_mb": peak_memory(self.device),
        }  # fmt: skip
        for name, (heads, _) in ways.items():
            first, *others = times[name]
            found["ways"][name] = {
                "ms_per_step": 1000 * statistics.median(others), "waits_per_step": waits[name],
                "first_seconds": first * (EAGER_STEPS if name == "eager" else AR_STEPS),
            }  # fmt: skip
            found["notes"] = heads.sessions.notes
            found["captures"] = {n: asdict(s) for n, s in heads.captures.items()}
            found["calls"] = {n: s.calls for n, s in heads.sessions.calls.items()}
        milliseconds = {name: way["ms_per_step"] for name, way in found["ways"].items()}
        found["ratio_of_eager"] = milliseconds["eager"] / milliseconds["captured"]
        found["ratio_of_captured"] = milliseconds["captured"] / milliseconds["lossless"]
        return found

    def image(self, heads: OpenHeads, head: Head, role: str, batch: int, steps: int) -> float:
        """Seconds of one batch of images in `steps` autoregressive steps of the usual 64."""
        config = config_of(self.bundle, num_images=batch, batch_size=batch, cfg=2.0, num_iter=64)
        sampler = make_sampler(self.bundle.manifest, config, self.device)
        images: Batch = make_batch(self.bundle.manifest, config, list(range(batch)), self.device)
        sampler = replace(sampler, noise=TabledNoise(sampler.noise, images.images, 256))
        member = Member(role, heads.backbone(role), head)
        start = time.perf_counter()
        with own_stream(self.device)():
            # A step ends with a transfer of its tokens' check, which waits for all that was queued.
            list(islice(Alone(sampler, member, 16).rounds(images), steps))
        return time.perf_counter() - start


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """Counts the operations of PyTorch that make the host wait for the GPU, if there is one."""
    count = [0]
    if not torch.cuda.is_available():
        yield count
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode("default")
            count[0] = sum("synchroniz" in str(w.message) for w in caught)


SIZES = (
    ("target/backbone", {"batch": 2, "visible": 128, "positions": 4}),
    ("target/backbone", {"batch": 16, "visible": 128, "positions": 4}),
    ("target/denoiser_first", {"rows": 4, "tokens": 4}),
    ("target/denoiser_hoisted", {"rows": 4, "tokens": 4}),
    ("target/head_modulation", {"tokens": 4}),
    (
        "target/speculative_round_hoisted",
        {"tokens": 4, "rows": 64, "window": 16, "modulated": 4},
    ),
    ("target/speculative_round", {"tokens": 32, "rows": 512, "window": 16}),
)


def latencies(pair: SyntheticPair) -> Found:
    """Milliseconds of single graphs, eager and captured."""
    return {f"{label} {sizes}": graph_latency(pair, label, sizes) for label, sizes in SIZES}


def graph_latency(pair: SyntheticPair, label: str, sizes: dict[str, int]) -> Found:
    """Median milliseconds of one graph at `sizes`, eager and captured."""
    session = pair.open(pair.bundle, label, "torch")
    inputs = session.spec.example_inputs({**session.spec.sizes("opt"), **sizes}, seed=1)
    moved = {name: tensor.cuda() for name, tensor in inputs.items()}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        eager = median_ms(lambda: session(**moved))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        session(**moved)
    with torch.cuda.stream(stream):
        captured = median_ms(graph.replay)
    return {"eager_ms": eager, "captured_ms": captured}


def median_ms(work: Callable[[], object]) -> float:
    """Median time on the device, after three runs to warm up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def release() -> None:
    """Give the memory of what is no longer needed back."""
    gc.collect()
    torch.cuda.empty_cache()


def check(bundle: Bundle, left: Callable[[], float], write: Callable[[Found], None]) -> Found:
    """Every part while time is `left` (seconds), with the report written after each."""
    report: Found = {}
    rates = np.full(100, 0.85)  # about that of the shipped pair, should recording fail
    held: dict[str, Any] = {"rates": rates}

    def record() -> Found:
        held["rates"] = recorded_acceptance(bundle)
        return {"by_step": held["rates"].round(3).tolist()}

    def build() -> Found:
        presets = {"target": "mar-h", "draft": "mar-b"}
        held["pair"] = Synthetic(presets, "bf16", held["rates"], compiled=True)
        return {"seconds": held["pair"].seconds}

    parts: list[tuple[str, float, Callable[[], Found]]] = [
        ("versions", 5, versions),
        ("noise", 5, noise_is_the_same),
        ("both devices", 15, lambda: both_devices(bundle)),
        ("shipped images", 30, lambda: shipped_images(bundle)),
        ("acceptance", 15, record),
        ("SYNTHETIC pair", 15, build),
        ("SYNTHETIC graphs", 45, lambda: latencies(held["pair"].pair)),
        ("SYNTHETIC mar-h, batch 1", 45, lambda: held["pair"].measure("target", 1)),
        ("SYNTHETIC mar-h, batch 8", 45, lambda: held["pair"].measure("target", 8, repeats=2)),
        ("SYNTHETIC mar-b, batch 1", 30, lambda: held["pair"].measure("draft", 1)),
        ("shipped speed", 45, lambda: shipped_speed(bundle)),
        ("served", 35, lambda: served(bundle)),
    ]
    for name, needs, work in parts:
        if left() < needs:
            report[name] = {"skipped": f"{left():.0f} s left, it needs {needs:.0f}"}
            continue
        start = time.perf_counter()
        try:
            report[name] = work()
        except (CspdError, RuntimeError, KeyError) as error:
            report[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        report[name]["part_seconds"] = round(time.perf_counter() - start, 1)
        write(report)
        release()
    return report
