"""Bulk generation on Ray: an actor per GPU or share of the CPUs, which the driver feeds and hears.

Workers compute, the driver writes: whatever dies, what is on disk follows one rule (see `folder`).
Which worker makes an image, when, and how often decides nothing about its bytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cspd.engines.bundle import Bundle
from cspd.engines.cpus import available_cpus
from cspd.engines.errors import CspdError
from cspd.runtime.config import RunConfig
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.scale.local_ray import begin_ray, import_ray, local_ray, unannounced
from cspd.runtime.scale.shipping import Shipment, ship, unpack
from cspd.runtime.scale.stopping import StopWish
from cspd.runtime.sessions import Sessions
from cspd.runtime.store.batches import FinishedBatch, encode, timed_batches

# Batches that a worker has at once: the one in work, and the next, so that it never waits.
IN_FLIGHT = 2
# A batch that was with a dying worker this often is taken to be what kills it.
MAX_DEATHS = 4
CPUS_PER_WORKER = 4
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Machine:
    """What runs the networks: `threads` 0 leaves their number to the backend."""

    device: str = "cpu"
    threads: int = 0


@dataclass(frozen=True)
class Cluster:
    """Where Ray runs ("local": here, started for this run), and how many workers it gets."""

    address: str = "local"
    workers: int | None = None


@dataclass(frozen=True)
class Refusal:
    """A CspdError of a worker, as data."""

    message: str


class Worker:
    """The actor: opens the bundle of its node when it is first asked, then makes images."""

    def __init__(self, config: RunConfig, machine: Machine) -> None:
        self._config, self._machine = config, machine
        self._pipeline: Pipeline | None = None

    def ready(self) -> None:
        """Return once the actor runs."""

    def make(self, shipment: Shipment, indices: list[int]) -> FinishedBatch | Refusal:
        """The images `indices`, at most a batch, by the bundle in `shipment`."""
        try:
            pipeline = self._opened(shipment)
            (images, tally), *_ = timed_batches(pipeline, self._config, indices)
        except CspdError as error:
            return Refusal(str(error))
        files = [encode(self._config, pipeline.bundle, image) for image in images]
        return FinishedBatch(files, tally, os.getpid())

    def _opened(self, shipment: Shipment) -> Pipeline:
        if self._pipeline is None:
            bundle = unpack(import_ray(), shipment)
            threads = self._machine.threads
            torch.set_num_threads(max(1, threads))
            pipeline = Pipeline(
                Sessions(bundle, self._config.backend, self._machine.device, threads)
            )
            pipeline.open(self._config)
            self._pipeline = pipeline
        return self._pipeline


@dataclass
class Pool:
    """Workers, the batches that wait, and those in flight (reference -> worker, batch).

    A worker that died is asked to be `ready`, which Ray answers when it has restarted it, on
    another node if need be; until then it is `away` and gets no work. `say` gets a line about it.
    """

    ray: Any
    shipment: Shipment
    workers: list[Any]
    waiting: deque[list[int]]
    flying: dict[Any, tuple[Any, list[int] | None]] = field(default_factory=dict)
    away: set[Any] = field(default_factory=set)
    deaths: Counter[int] = field(default_factory=Counter)
    say: Callable[[str], None] = print

    def batches(self, stop: StopWish) -> Iterator[FinishedBatch]:
        """Every batch as it is finished, in any order; after a signal only those in flight."""
        self._feed()
        while self.waiting or any(batch for _, batch in self.flying.values()):
            done, _ = self.ray.wait(list(self.flying), num_returns=1, timeout=POLL_SECONDS)
            for reference in done:
                worker, batch = self.flying.pop(reference)
                result = self._result(reference, worker, batch)
                if isinstance(result, Refusal):
                    raise CspdError(result.message)
                if result is not None:
                    yield result
            if stop.number is not None:
                self.waiting.clear()
            self._feed()

    def _result(self, reference: Any, worker: Any, batch: list[int] | None) -> Any:
        """What a worker answered; None if it died, or only said that it is ready again."""
        errors = self.ray.exceptions
        try:
            result = self.ray.get(reference)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            self._lost(worker, batch, error)
            return None
        if batch is None:
            self.away.discard(worker)
        return result

    def _lost(self, worker: Any, batch: list[int] | None, error: Exception) -> None:
        """Take back the batch of a dead worker, and wait for the worker to be restarted."""
        reason = str(error).strip().splitlines()[0]
        if batch is None:
            self.workers.remove(worker)
            if not self.workers:
                raise CspdError(f"no worker is left: {reason}")
            return
        self.deaths[batch[0]] += 1
        if self.deaths[batch[0]] == MAX_DEATHS:
            raise CspdError(
                f"images {batch[0]}..{batch[-1]}: {MAX_DEATHS} workers died with them ({reason}); "
                "too little memory for --batch-size?"
            )
        self.say(f"a worker died ({reason}); images {batch[0]}..{batch[-1]} are made again")
        self.waiting.appendleft(batch)
        if worker not in self.away:
            self.away.add(worker)
            again = worker.ready.options(max_task_retries=-1).remote()
            self.flying[again] = (worker, None)

    def _feed(self) -> None:
        """Give every worker what it can take of what waits; this bounds what is in flight."""
        held = Counter(id(worker) for worker, _ in self.flying.values())
        for worker in self.workers:
            if worker in self.away:
                continue
            for _ in range(min(IN_FLIGHT - held[id(worker)], len(self.waiting))):
                batch = self.waiting.popleft()
                self.flying[worker.make.remote(self.shipment, batch)] = (worker, batch)


@contextlib.contextmanager
def pool(
    ray: Any, bundle: Bundle, config: RunConfig, machine: Machine, cluster: Cluster,
    missing: list[int],
) -> Iterator[Pool]:  # fmt: skip
    """Workers for the images `missing`, in batches of neighbours; they end with the block."""
    count, share, resources = _shares(ray, machine, cluster)
    # The shipment goes with every batch: an actor made with references warns on stderr.
    shipment = ship(ray, bundle)
    actor = ray.remote(Worker).options(max_restarts=-1, scheduling_strategy="SPREAD", **resources)
    workers = [actor.remote(config, share) for _ in range(count)]
    size = config.batch_size
    waiting = deque(missing[first : first + size] for first in range(0, len(missing), size))
    try:
        yield Pool(ray, shipment, workers, waiting)
    finally:
        for worker in workers:
            ray.kill(worker)


@contextlib.contextmanager
def connected(machine: Machine, cluster: Cluster) -> Iterator[Any]:
    """Ray, connected to the cluster or started here; a connection that is there is used.

    What Ray prints goes to stderr, and not among our results.
    """
    ray = import_ray()
    with contextlib.redirect_stdout(sys.stderr), unannounced(ray):
        if ray.is_initialized():
            yield ray
            return
        if cluster.address == "local":
            wanted = (cluster.workers or 1) * max(1, machine.threads)
            cpus = max(wanted, available_cpus())
            with local_ray("--ray local: cannot start Ray", num_cpus=cpus):
                yield ray
            return
        advice = "start Ray there with 'ray start --head', or use --ray local"
        begin_ray(
            ray, f"--ray {cluster.address}: cannot connect", advice, address=cluster.address
        )  # fmt: skip
        try:
            yield ray
        finally:
            ray.shutdown()


def _shares(ray: Any, machine: Machine, cluster: Cluster) -> tuple[int, Machine, dict[str, float]]:
    """Number of workers, what each runs on, and the resources that Ray keeps for each."""
    if machine.device == "cuda":
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if not 1 <= (cluster.workers or gpus) <= gpus:
            raise CspdError(
                f"--workers {cluster.workers or 1}: the cluster has {gpus} GPUs, one per worker"
            )
        return cluster.workers or gpus, machine, {"num_gpus": 1, "num_cpus": 1}
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    count = cluster.workers or max(1, sum(nodes) // CPUS_PER_WORKER)
    threads = machine.threads or split_cpus(nodes, count)
    if sum(cpus // threads for cpus in nodes) < count:
        raise CspdError(
            f"--workers {count} with {threads} CPUs each do not fit, the nodes have "
            f"{', '.join(map(str, nodes))}; use fewer --workers or --threads"
        )
    return count, Machine("cpu", threads), {"num_cpus": threads}


def split_cpus(nodes: list[int], workers: int) -> int:
    """The most CPUs per worker with which all `workers` find a place on `nodes`; at least 1."""
    for share in range(max(1, sum(nodes) // workers), 1, -1):
        if sum(cpus // share for cpus in nodes) >= workers:
            return share
    return 1
