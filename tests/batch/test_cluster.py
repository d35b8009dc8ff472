"""Batches on a Ray cluster of this machine: what its actors make is what one process makes, killed or not."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ldm2.batch import cluster, manifest
from ldm2.batch.columns import records_in, rows_in
from ldm2.batch.local import Folder
from ldm2.batch.rows import Rules
from ldm2.batch.worker import Worker
from ldm2.cli.commands import main

KINDS = ("DeprecationWarning", "FutureWarning")            # of Ray, about its own settings
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}:ray[.].*") for kind in KINDS]
SHORT = {"steps": 2, "seconds": 0.4}


@pytest.fixture(scope="module")
def ray():
    """A cluster of one machine with four CPUs."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def sounds(folder: Path) -> dict:
    """The bytes of each file below audio/."""
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "audio").rglob("*") if path.is_file()}


def kill_an_actor(folder: Path) -> int:
    """Kill one of the actors that work, once there is a sound. Returns its process."""
    while not sounds(folder):
        time.sleep(0.05)
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):                            # it has ended meanwhile
            if (place / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                os.kill(int(place.name), signal.SIGKILL)
                return int(place.name)
    return 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_actors_make_what_one_process_makes_though_one_is_killed(ray, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"low hum {i}", "id": f"r{i}", "label": i, **SHORT} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": ""}]))
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(kill_an_actor(tmp_path / "ray")), daemon=True)
    killer.start()
    arguments = ["rows.jsonl", "--model", "tiny", "-q", "--batch", "1"]
    assert main(["batch", *arguments, "-o", "ray", "--ray", "--workers", "2"]) == 1
    assert "41 rows: 0 were done before, 40 done now, 1 failed" in capsys.readouterr().out
    killer.join(60)
    assert killed and killed[0]
    assert main(["batch", *arguments, "-o", "local"]) == 1
    assert sounds(tmp_path / "ray") == sounds(tmp_path / "local") and len(sounds(tmp_path / "ray")) == 40
    merged = [[json.loads(line) for line in (tmp_path / name / "manifest.jsonl").read_text().splitlines()]
              for name in ("ray", "local")]
    told = [[{name: value for name, value in record.items() if name != "ms"} for record in each] for each in merged]
    assert told[0] == told[1] and [record["label"] for record in merged[0][:40]] == list(range(40))
    assert "were done before, 0 done now" in (main(["batch", *arguments, "-o", "ray", "--ray"]),
                                              capsys.readouterr().out)[1]


def test_a_pipeline_of_others_goes_through_the_worker(ray, tmp_path):
    rows = [{"prompt": "rain", "id": "a", "seed": 2**63 + 1, "label": None, **SHORT},
            {"prompt": "wind", "id": "b", "seed": None, "label": "x", **SHORT}, {"prompt": "", "id": "c"}]
    made = cluster.on_ray(ray.data.from_items(rows), "tiny", str(tmp_path), workers=1, cpus=2, load={"device": "cpu"})
    found = {record["id"]: record for record in made.take_all()}
    assert [found[name]["status"] for name in "abc"] == ["ok", "ok", "error"]
    assert found["a"]["seed"] == 2**63 + 1 and found["b"]["label"] == "x" and "prompt must not" in found["c"]["error"]
    assert len(sounds(tmp_path)) == 2 and len(manifest.settled(Folder(tmp_path))) == 3


@pytest.mark.parametrize("asked, words", [
    ((4, 1), "4 workers of 1 CPUs take all 4 CPUs of the cluster, .*: leave one"),
    ((3, 2), "3 workers of 2 CPUs do not fit on the cluster as it is, which has 4 CPUs"),
    ((1, 1, 1.0), "1 workers of 1 CPUs and 1 GPUs do not fit"),
])
def test_actors_that_would_wait_for_ever_are_refused(ray, asked, words):
    with pytest.raises(ValueError, match=words):
        cluster.Share.of(*asked)


def test_a_share_leaves_a_cpu(ray):
    assert cluster.Share.of(None) == cluster.Share(1, 3, 0.0)
    assert cluster.Share.of(2) == cluster.Share(2, 1, 0.0)


def test_memory_is_not_shared(ray):
    with pytest.raises(ValueError, match="memory://x is of one process"):
        cluster.on_ray(ray.data.range(1), "tiny", "memory://x")


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm2\[ray\]'"):
        cluster.engine()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_does_not_answer_is_told_at_once(address):
    with pytest.raises(ValueError, match=f"no Ray cluster at {address}"):
        cluster._check_answers(address)


# --- tables of Arrow -------------------------------------------------------------------------------------------------

def test_whole_numbers_and_gaps_survive_in_arrow():
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"prompt": ["rain", "wind"], "steps": [3, None], "seed": pyarrow.array([None, 2**64 - 1],
                                                                                                "uint64")})
    first, second = rows_in(table, Rules({}))
    assert (first.options["steps"], second.options["seed"]) == (3, 2**64 - 1) and "steps" not in second.options


def test_records_have_the_same_types_whatever_failed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    worker = Worker("tiny", str(tmp_path), name="", defaults=SHORT)
    good, bad = (worker(pyarrow.table({"prompt": [prompt], "path": ["p"], "label": [[1]]})) for prompt in ("rain", ""))
    assert good.schema == bad.schema and good.to_pylist()[0]["row_path"] == "p"
    assert (good["status"].to_pylist(), bad["status"].to_pylist()) == (["ok"], ["error"])
    refused = worker(pyarrow.table({"prompt": ["rain"], "step": [3]})).to_pylist()[0]
    assert "did you mean steps" in refused["error"] and refused["step"] == 3


def test_a_mapping_of_columns_comes_back_as_one():
    columns = {"prompt": ["rain"], "steps": np.array([3])}
    [row] = rows_in(columns, Rules({}))
    assert records_in([{"id": row.id, "path": None}], columns, Rules({})) == {"id": [row.id], "path": [None]}
