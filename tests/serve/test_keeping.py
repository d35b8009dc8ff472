"""What is kept, for how long, and what is told of it, without a model."""

from __future__ import annotations

import time

import pytest

from ldm2.serve.asked import Asked, Upload
from ldm2.serve.errors import Refused
from ldm2.serve.folder import Folder
from ldm2.serve.jobs import Job, Jobs, Sound
from ldm2.serve.limits import Limits
from ldm2.serve.metrics import Metrics


@pytest.fixture
def make(tmp_path):
    """Jobs with these limits, in a folder of their own."""
    folders = []

    def made(**limits):
        folders.append(Folder(tmp_path))
        return Jobs(folders[-1], Limits(**limits), Metrics())

    yield made
    for folder in folders:
        folder.close()


def submitted(jobs, name, client="me", upload=0):
    """A job in the queue, with an upload of some bytes."""
    there = None
    if upload:
        path = jobs.folder.of(name) / "in.wav"
        path.write_bytes(bytes(upload))
        there = Upload(path, 1.0, upload)
    job = Job(name, Asked("generate", {"task": "generate"}, {}, {}, "wav", there), client)
    jobs.submit(job)
    return job


def done(jobs, name, size=10):
    """A job that is done, with a file of some bytes."""
    job = submitted(jobs, name)
    assert jobs.take(lambda row: row.id, lambda row: 1) == [job]
    path = jobs.folder.of(name) / "sound.wav"
    path.write_bytes(bytes(size))
    jobs.complete(job, [Sound(path, 1, None, 0.1, 16_000, size)])
    return job


def names(jobs):
    return [job.id for job in jobs.all()]


def test_the_oldest_go_when_there_are_too_many(make):
    jobs = make(keep_jobs=2)
    for name in "abc":
        done(jobs, name)
    assert names(jobs) == ["c", "b"] and not (jobs.folder.path / "a").exists()


def test_the_oldest_go_when_they_are_too_big_and_the_newest_stays(make):
    jobs = make(keep_mb=0.001)
    done(jobs, "a", 600)
    done(jobs, "b", 600)
    assert names(jobs) == ["b"]
    done(jobs, "c", 5000)
    assert names(jobs) == ["c"]


def test_what_is_too_old_goes(make, monkeypatch):
    jobs = make(keep_minutes=2)
    done(jobs, "a")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 119)
    jobs.sweep()
    assert names(jobs) == ["a"]
    monkeypatch.setattr(time, "time", lambda: now + 121)
    jobs.sweep()
    assert names(jobs) == [] and {path.name for path in jobs.folder.path.iterdir()} == {"lock"}


def test_uploads_that_wait_are_bounded(make):
    jobs = make(keep_mb=0.001)
    submitted(jobs, "a", upload=700)
    with pytest.raises(Refused, match="uploads that wait") as refused:
        submitted(jobs, "b", upload=700)
    assert refused.value.status == 429 and names(jobs) == ["a"]


def test_each_client_has_its_own_share(make):
    jobs = make(queue=3, pending=2)
    submitted(jobs, "a", "x")
    submitted(jobs, "b", "x")
    with pytest.raises(Refused, match="2 of your jobs"):
        submitted(jobs, "c", "x")
    submitted(jobs, "d", "y")
    with pytest.raises(Refused, match="3 jobs are waiting"):
        submitted(jobs, "e", "z")


def test_a_run_takes_those_of_its_group_in_their_order(make):
    jobs = make()
    order = [submitted(jobs, name) for name in ("a1", "b1", "a2", "a3", "b2", "a4")]
    taken = jobs.take(lambda row: row.id[0], lambda row: 3)
    assert [job.id for job in taken] == ["a1", "a2", "a3"]
    assert [jobs.describe(job)["queue_position"] for job in order] == [None, 1, None, None, 2, 3]


def test_one_of_a_run_is_cancelled_and_the_others_go_on(make):
    jobs = make()
    one, other = submitted(jobs, "a"), submitted(jobs, "b")
    jobs.take(lambda row: "", lambda row: 8)
    jobs.cancel(one)
    assert not jobs.unwanted([one, other]) and (one.status, other.status) == ("cancelled", "in_progress")
    jobs.complete(one, [])
    jobs.cancel(other)
    assert jobs.unwanted([one, other]) and other.status == "cancelled"


def test_what_ends_ends_once_and_is_counted(make):
    jobs = make()
    done(jobs, "a")
    waiting = submitted(jobs, "b")
    jobs.close()
    assert waiting.status == "cancelled"
    jobs.fail(waiting, Refused(500, "x", "x"))
    assert (waiting.status, waiting.error) == ("cancelled", None)
    with pytest.raises(Refused, match="is being stopped"):
        submitted(jobs, "c")
    text = jobs.metrics.text().decode()
    assert 'ldm2_jobs_total{kind="generate",status="completed"} 1.0' in text
    assert 'ldm2_jobs_total{kind="generate",status="cancelled"} 1.0' in text
    assert "failed" not in text


def test_time_left_is_that_of_the_steps_so_far(make, monkeypatch):
    jobs = make()
    job = submitted(jobs, "a")
    jobs.take(lambda row: "", lambda row: 1)
    now = time.time()
    for second, done_ in enumerate((0, 1, 2)):
        monkeypatch.setattr(time, "time", lambda second=second: now + 3 * second)
        jobs.progress([job], "denoising", done_, 10)
    assert jobs.describe(job)["seconds_left"] == pytest.approx(24)
    jobs.progress([job], "decoding", 0, 1)
    assert jobs.describe(job)["seconds_left"] is None
