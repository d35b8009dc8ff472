"""How many processes: what is measured, what is chosen, and how long a job will take."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time

import pytest

from ldm2.batch import measured, pool, tuner
from ldm2.batch.rows import Rules
from ldm2.batch.tuner import PORTION, Plan, Tuner
from ldm2.cli.commands import main

KIND = (("task", "generate"), ("seconds", 2.0), ("steps", 10))


def chosen(ms_of_a_row: dict[int, float], cores: int, left: int = 10_000, kinds=(KIND,)) -> tuple[Plan, list[str], int]:
    """What is chosen where a row takes so many ms, by the number of processes; the lines that are told; rows made."""
    told: list[str] = []
    tuned, rows = Tuner(cores, told.append), 0
    while not tuned.settled:
        for member in range(tuned.plan.workers):
            for _ in range(PORTION):
                kind = kinds[rows % len(kinds)]
                tuned.made(member, kind, ms_of_a_row[tuned.plan.workers] * measured.work(kind) / measured.work(KIND))
                rows += 1
            tuned.finished(member, left - rows, os.getpid())
        if tuned.coming is not None:
            tuned.made(0, KIND, 1e9)                       # of a portion that was handed out before: not counted
            tuned.ready()
    return tuned.plan, told, rows


@pytest.fixture
def room(monkeypatch):
    """Memory for any number of processes."""
    monkeypatch.setattr(tuner, "room_for", lambda number, pid: True)


@pytest.mark.parametrize("ms, cores, best", [
    ({1: 100, 2: 150}, 2, Plan(2, 1)), ({1: 100, 2: 210}, 2, Plan(1, 2)),
    ({1: 100, 2: 120, 4: 300, 8: 1}, 8, Plan(2, 4)), ({1: 100, 2: 120, 4: 140, 8: 160}, 8, Plan(8, 1)),
    ({1: 100, 2: 150}, 3, Plan(2, 1)), ({1: 100}, 1, Plan(1, 1)),
])
def test_the_fastest_plan_is_chosen(room, ms, cores, best):
    plan, told, rows = chosen(ms, cores)
    assert plan == best and rows < 600
    assert (f"; {best} it is" in told[0]) if cores > 1 else told == []


def test_rows_of_other_lengths_are_compared_by_their_work(room):
    longer = (("task", "generate"), ("seconds", 8.0), ("steps", 10))
    assert chosen({1: 100, 2: 150}, 2, kinds=(KIND, longer, longer))[0] == Plan(2, 1)
    assert chosen({1: 100, 2: 210}, 2, kinds=(KIND, KIND, longer))[0] == Plan(1, 2)


def test_rates_are_told_in_rows_a_minute(room):
    assert chosen({1: 100, 2: 150}, 2)[1] == ["processes x threads, rows a minute: 1 x 2: 600, 2 x 1: 800; 2 x 1 it is"]


def test_another_plan_must_be_worth_it_and_have_room(room, monkeypatch):
    assert chosen({1: 100}, 2, left=500)[0] == Plan(1, 2)                    # 50 s to go
    monkeypatch.setattr(tuner, "room_for", lambda number, pid: False)
    assert chosen({1: 100}, 2)[0] == Plan(1, 2)


class Process:
    """Stands for a process that lives."""

    def __init__(self):
        self.sentinel, self.pid = os.pipe()[0], os.getpid()

    def is_alive(self):
        return True

    def nothing(self, *_):
        """There is no process to end."""

    join = kill = terminate = nothing


@pytest.mark.parametrize("ms, threads", [({2: 100.0, 1: 150.0}, 1), ({2: 100.0, 1: 250.0}, 2)])
def test_the_pool_follows_the_tuner_and_loses_no_row(room, monkeypatch, ms, threads):
    given: list[tuple[int, int]] = []                                        # by portions: the member, its threads

    class Member(pool._Member):
        def start(self):
            self.process, (self.connection, theirs) = Process(), multiprocessing.Pipe()
            threading.Thread(target=self.serve, args=(theirs, len(members)), daemon=True).start()
            members.append(self)

        def serve(self, connection, number):
            connection.send(("ready", None))
            while (portion := connection.recv()) is not None:
                rows, count = portion
                given.append((number, count))
                for row in rows:
                    connection.send(("row", {"id": row.id, "ms": ms[count]}))
                time.sleep(0.005)
                connection.send(("idle", None))

    members: list[Member] = []
    monkeypatch.setattr(pool, "_Member", Member)
    done: list[str] = []
    made_in = pool.Pool([{}, {}], lambda record: done.append(record["id"]), Tuner(2, lambda line: None))
    rows = Rules({})
    made_in.run((rows.row(i, {"prompt": "x", "id": f"{i}"}) for i in range(2000)), 2000)
    assert sorted(done, key=int) == [f"{i}" for i in range(2000)]
    assert given[0] == (0, 2) and (1, 1) in given and given[-1][1] == threads
    assert made_in.workers == len({member for member, _ in given[-8:]}) == 2 // threads


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs /proc")
def test_room_is_told_from_free_memory():
    assert tuner.room_for(1, os.getpid()) and not tuner.room_for(10**6, os.getpid())
    assert not tuner.room_for(1, 2**22 + 1)


# --- how long it will take -------------------------------------------------------------------------------------------

def test_work_is_steps_for_a_second_of_sound():
    def of(**options):
        return measured.work(Rules({}).row(1, {"prompt": "x", **options}).kind)

    assert of(steps=10, seconds=2.0) == 40 and of(steps=10, seconds=2.0, guidance_scale=1.0) == 20
    assert of(preset="fast", seconds=2.0, num_waveforms=3) == 144 and of() == 200 * 10.24 * 2


def test_what_was_measured_is_what_is_expected():
    other = (("task", "generate"), ("seconds", 4.0), ("steps", 20))
    assert measured.estimate("m", {}, {KIND: 5}) is None
    measured.keep("m", {}, 2, {KIND: [10, 5000.0, 1000]})
    about = measured.estimate("m", {"device": "auto"}, {KIND: 4})
    assert (about.seconds, about.bytes, about.workers, about.known) == (2.0, 400.0, 2, 4)
    about = measured.estimate("m", {}, {KIND: 4, other: 1})
    assert (about.seconds, about.bytes, about.known) == (2.0 + 0.5 * 4, 400.0 + 200, 4)
    assert measured.estimate("another", {}, {KIND: 4}) is None and measured.estimate("m", {"dtype": "x"}, {}) is None
    measured.keep("m", {}, 1, {KIND: [1, 100.0, 100]})
    assert measured.estimate("m", {}, {KIND: 1}).seconds == 0.1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', "null"])
def test_a_damaged_file_of_measurements_is_none(content):
    path = measured._path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert measured.estimate("m", {}, {KIND: 1}) is None
    measured.keep("m", {}, 1, {KIND: [1, 100.0, 100]})
    path.write_text(json.dumps({name: {"workers": 1, "kinds": 3} for name in json.loads(path.read_text())}))
    assert measured.estimate("m", {}, {KIND: 1}) is None


def test_a_dry_run_says_how_long_by_what_earlier_rows_took(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "rain", "steps": 2, "seconds": 0.4}\n')
    (tmp_path / "b.jsonl").write_text("".join(f'{{"prompt": "{i}", "steps": 2, "seconds": 0.4}}\n' for i in range(900)))
    dry = ["batch", "b.jsonl", "-o", "b", "--model", "tiny", "--dry-run"]
    assert main(dry) == 0
    assert "nothing has been measured on this machine with tiny" in capsys.readouterr().out
    assert main(["batch", "a.jsonl", "-o", "a", "--model", "tiny", "-q"]) == 0
    capsys.readouterr()
    assert main(dry) == 0
    [record] = [json.loads(line) for line in (tmp_path / "a/manifest.jsonl").read_text().splitlines()]
    out = capsys.readouterr().out
    about = measured.estimate("tiny", {}, {Rules({}).row(1, {"prompt": "x", "steps": 2, "seconds": 0.4}).kind: 900})
    assert about.seconds == pytest.approx(900 * record["ms"] / 1e3) and about.bytes == 900 * record["bytes"]
    assert f"and {about.bytes / 1e6:.1f} MB to go in 1 process, by what rows like them took on this machine" in out


@pytest.mark.parametrize("place", ["", "relative", "."])
def test_a_cache_that_is_named_by_no_whole_path_counts_as_not_set(monkeypatch, tmp_path, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert measured._path() == tmp_path / ".cache" / "ldm2" / "measured.json"
