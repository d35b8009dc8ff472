"""A batch on a Ray cluster: the worker of every batch, in the actors of Ray Data.

What Ray does by itself and what is done about it here: actors that take all CPUs leave none to who reads the rows, and
the job waits for ever without a word (refused); an actor without num_cpus has one thread (it is given); a file is one
block, which one actor gets (blocks are made small); an exception ends the job (a row's error is a record).
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm2.batch.columns import READY, ready
from ldm2.batch.local import Folder
from ldm2.batch.pool import AT_ONCE, JobError, chunks
from ldm2.batch.remote import Remote, of_one_process, opened
from ldm2.batch.rows import Row
from ldm2.fields import one_line

if TYPE_CHECKING:
    from ray.data import Dataset

AHEAD = 2                                  # batches that lie ready for an actor


def on_ray(
    dataset: Dataset, model: str, out: str, *, workers: int | None = None, cpus: int | None = None,
    gpus: float | None = None, batch: int = 0, format: str = "flac", load: Mapping[str, Any] | None = None,
    form: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None, allow_extra: bool = False,
) -> Dataset:
    """A Ray dataset of prompts and options -> one of records, whose sounds lie below `out`. Ray is running.

    dataset:     columns are options by their names; `prompt`, and an `id` of its own for each row; others are kept
    out:         an address or a folder that all machines have
    workers:     actors; default: one for each GPU, or for each machine where there are none
    cpus, gpus:  of each actor; default: one CPU and a GPU, or an equal share of a machine's CPUs but one
    The rest is as of `ldm2.batch.worker.Worker`.

    The records are the lines of a manifest: id path status error seed seconds sample_rate score ms bytes line asked
    prompt. Raises ValueError for workers that the cluster has no room for.
    """
    check_shared(opened(out))
    share = Share.of(workers, cpus, gpus)
    arguments = {"model": model, "out": out, "batch": batch, "format": format, "load": dict(load or {}),
                 "form": dict(form or {}), "defaults": dict(defaults or {}), "allow_extra": allow_extra}
    return _mapped(dataset.repartition(target_num_rows_per_block=AT_ONCE), arguments, share)


def _mapped(dataset: Dataset, arguments: dict[str, Any], share: Share) -> Dataset:
    """The dataset through actors with a worker each. A killed actor is replaced, and its rows are made again."""
    from ray.data import ActorPoolStrategy

    from ldm2.batch.worker import Worker

    return dataset.map_batches(
        Worker, fn_constructor_kwargs=arguments | {"name": "", "threads": share.cpus}, batch_size=AT_ONCE,
        batch_format="pyarrow", num_cpus=share.cpus, num_gpus=share.gpus or None,
        compute=ActorPoolStrategy(size=share.workers, max_tasks_in_flight_per_actor=AHEAD),
        runtime_env={"env_vars": {"OMP_WAIT_POLICY": "passive"}},
    )


def run(arguments: dict[str, Any], rows: Iterable[Row], share: Share, done: Callable[[dict[str, Any]], object]) -> None:
    """Make rows on the cluster. Raises JobError."""
    ray = engine()
    try:
        dataset = ray.data.from_arrow_refs([ray.put(table) for table in _tables(rows, share.workers)])
        made: Any = _mapped(dataset, arguments, share)
        for table in made.iter_batches(batch_size=None, batch_format="pyarrow"):
            for record in table.to_pylist():
                done(record)
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray: {str(error).strip().splitlines()[-1]}") from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the Ray cluster at an address ("auto": the one here; "": RAY_ADDRESS, or one that is started).

    Raises ValueError where there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
    ray = engine()
    mine = not ray.is_initialized()
    if mine:
        _check_answers(address or os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(address or None, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"no Ray cluster at {address or 'RAY_ADDRESS'}: {one_line(error)}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ValueError if nobody listens at host:port, which Ray would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]") or "localhost", int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster at {address}: {one_line(error)}") from None


def engine() -> Any:
    """Ray, with its data. Raises ImportError, one line, where it is not installed."""
    try:
        import ray.data
    except ImportError:
        raise ImportError("Ray is not installed: pip install 'ldm2[ray]'") from None
    return ray


def _tables(rows: Iterable[Row], workers: int) -> Iterator[Any]:
    """Blocks of rows that can run together."""
    import pyarrow

    for portion in chunks(rows, workers):
        yield pyarrow.table({READY: ready(portion)})


@dataclass(frozen=True)
class Share:
    """What the actors take of a cluster: how many there are, and the CPUs and GPUs of each."""

    workers: int
    cpus: int
    gpus: float

    @classmethod
    def of(cls, workers: int | None, cpus: int | None = None, gpus: float | None = None) -> Share:
        """The share that is asked for, or a good one. Raises ValueError for one that would never be given."""
        nodes = [node["Resources"] for node in engine().nodes() if node["Alive"]]
        sizes = [(int(node.get("CPU", 0)), node.get("GPU", 0.0)) for node in nodes]
        sizes = [size for size in sizes if size[0]]
        if gpus is None:
            gpus = 1.0 if any(card for _, card in sizes) else 0.0
        if workers is None:
            workers = max(1, int(sum(card // gpus for _, card in sizes)) if gpus else len(sizes))
        if cpus is None:
            together = math.ceil(workers / max(1, len(sizes)))               # on one machine
            cpus = 1 if gpus else max(1, (min((count for count, _ in sizes), default=1) - 1) // together)
        room = sum(int(min(count // cpus, card // gpus if gpus else math.inf)) for count, card in sizes)
        share, total = cls(workers, cpus, gpus), sum(count for count, _ in sizes)
        if workers > room:
            raise ValueError(f"{share} do not fit on the cluster as it is, which has {total} CPUs and "
                             f"{sum(card for _, card in sizes):g} GPUs on {len(sizes)} machines")
        if workers * cpus >= total:
            raise ValueError(f"{share} take all {total} CPUs of the cluster, and whoever reads the rows would wait "
                             f"for ever: leave one")
        return share

    def __str__(self) -> str:
        cards = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.workers} workers of {self.cpus} CPUs{cards}"


def check_shared(place: Folder | Remote) -> None:
    """Raise ValueError for a place that the actors would each have their own of."""
    if of_one_process(place):
        raise ValueError(f"{place} is of one process: the actors of Ray are others")
