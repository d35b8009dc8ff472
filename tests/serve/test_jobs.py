"""Jobs from their request to their sound: what clients see, what they hear, and how jobs end."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ldm2 import audio
from tests.helpers import tone
from tests.loras import make
from tests.serve.client import serving

SHORT = {"prompt": "a low hum", "steps": 2, "seconds": 0.4}
LONG = {"prompt": "a low hum", "steps": 200, "seconds": 10}


@pytest.fixture
def bell(tmp_path):
    audio.write(tmp_path / "bell.wav", tone(0.6), 16_000)
    return tmp_path / "bell.wav"


def heard(client, job, n=1):
    """The samples of a result."""
    answer = client.get(f"{job['url']}/content", params={"n": n})
    assert answer.status_code == 200, answer.text
    return soundfile.read(io.BytesIO(answer.content))[0], answer


def test_a_job_is_the_sound_that_generate_makes(client, pipe):
    job = client.ask(**SHORT, seed=3)
    assert (job["status"], job["settings"]["seed"], job["url"]) == ("queued", 3, f"/v1/jobs/{job['id']}")
    done = client.done(job)
    samples, answer = heard(client, done)
    expected = pipe.generate(**SHORT, seed=3).channels[0, 0]
    assert np.abs(samples - expected).max() <= 2**-15 and answer.headers["content-type"] == "audio/wav"
    [sound] = done["results"]
    assert (sound["seed"], sound["seconds"], sound["sample_rate"]) == (3, 0.4, 16_000)
    assert sound["bytes"] == len(answer.content) and sound["url"] == f"{job['url']}/content?n=1"


def test_the_settings_of_a_job_make_it_again(client):
    first = client.done(client.ask(**SHORT, preset="fast", prompt_at=[[0.2, "wind"]]))
    again = client.done(client.ask(**first["settings"]))
    assert again["settings"] == first["settings"] and first["settings"]["sampler"] == "dpmpp-2m"
    assert heard(client, again)[0].tobytes() == heard(client, first)[0].tobytes()


def test_an_answer_may_wait_for_the_end(client):
    answer = client.post("/v1/jobs?wait=60", json=SHORT)
    assert (answer.status_code, answer.json()["status"]) == (202, "completed")
    job = client.ask(**LONG)
    assert client.get(f"{job['url']}?wait=0.1").json()["status"] == "in_progress"
    client.delete(job["url"])
    assert client.get(f"{job['url']}?wait=60").json()["status"] == "cancelled"
    for wait in ("-1", "61", "nan", "inf", "x"):
        assert client.get(f"{job['url']}?wait={wait}").json()["error"]["param"] == "wait"


def test_the_settings_are_in_the_file(client, tmp_path):
    done = client.done(client.ask(**SHORT, format="flac", seed=5))
    (tmp_path / "sound.flac").write_bytes(heard(client, done)[1].content)
    told = json.loads(audio.read_metadata(tmp_path / "sound.flac")["comment"])
    assert (told["prompt"], told["seed"], told["model"]) == ("a low hum", 5, "tiny")


def test_candidates_come_best_first_with_their_scores_and_seeds(client):
    done = client.done(client.ask(**SHORT, num_waveforms=3, seed=7))
    scores = [sound["score"] for sound in done["results"]]
    assert scores == sorted(scores, reverse=True) and {sound["seed"] for sound in done["results"]} == {7, 8, 9}
    sounds = [heard(client, done, n)[0].tobytes() for n in (1, 2, 3)]
    assert len(set(sounds)) == 3
    assert client.get(f"{done['url']}/content?n=4").json()["error"]["param"] == "n"


@pytest.mark.parametrize("kind, more", [
    ("transfer", {"prompt": "wind"}), ("variations", {"num_waveforms": "2"}), ("super_resolution", {"above": "3000"}),
    ("inpaint", {"times": ["0.1:0.2", "0.4:"], "bands": "[[500, null]]"}), ("extend", {"seconds": "0.3"}),
    ("extend", {"prompt": "wind", "prompt_at": '[[0.7, "a siren"]]', "seconds": "0.3"}),
])
def test_every_edit_takes_a_form(client, pipe, bell, kind, more):
    done = client.done(client.edit(bell, kind=kind, steps="2", seed="4", **more))
    words = {name: json.loads(word) if isinstance(word, str) and word[0] in "[0123456789" else word
             for name, word in more.items()}
    if kind == "inpaint":
        words["times"] = [(0.1, 0.2), (0.4, None)]
    expected = getattr(pipe, kind)(bell, steps=2, seed=4, **words)
    assert np.abs(heard(client, done)[0] - expected.channels[0, 0]).max() <= 2**-15
    assert len(done["results"]) == len(expected)


def test_an_edit_names_its_input_as_the_client_does(client, bell, tmp_path):
    done = client.done(client.edit(bell, kind="transfer", prompt="wind", steps="2"))
    (tmp_path / "sound.wav").write_bytes(heard(client, done)[1].content)
    assert json.loads(audio.read_metadata(tmp_path / "sound.wav")["comment"])["input"] == "bell.wav"


def test_a_running_job_stops_at_its_next_step_and_the_next_one_runs(client):
    job, next_one = client.ask(**LONG), client.ask(**SHORT)
    while client.get(job["url"]).json()["step"] < 2:
        time.sleep(0.01)
    assert next_one["queue_position"] == 1
    before = client.get(job["url"]).json()["step"]
    client.delete(job["url"])
    stopped = client.done(job, "cancelled")
    assert stopped["step"] <= before + 2 and stopped["results"] == []
    client.done(next_one)
    assert client.get(f"{job['url']}/content").status_code == 409


def test_a_waiting_job_is_cancelled_at_once(client):
    running, waiting = client.ask(**LONG), client.ask(**LONG, sampler="euler")
    assert client.delete(waiting["url"]).json()["status"] == "cancelled"
    client.delete(running["url"])
    assert client.done(running, "cancelled")["finished"] is not None


def test_a_finished_job_is_removed_with_its_files(client):
    done = client.done(client.ask(**SHORT))
    place = client.jobs.folder.path / done["id"]
    assert place.exists()
    assert client.delete(done["url"]).status_code == 200
    assert client.get(done["url"]).status_code == 404 and not place.exists()


def test_events_tell_of_each_change_until_the_end(client):
    job = client.ask(**SHORT | {"steps": 20})
    events = []
    with client.stream("GET", f"{job['url']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                events.append([line[7:], None])
            elif line.startswith("data: "):
                events[-1][1] = json.loads(line[6:])
    steps = [told["step"] for _, told in events if told["stage"] == "denoising"]
    assert steps == sorted(steps) and len(set(steps)) > 3
    assert [kind for kind, _ in events].count("done") == 1 and events[-1][0] == "done"
    assert events[-1][1]["status"] == "completed" and events[-1][1]["results"]


def test_equal_shapes_run_together_and_sound_as_alone(client, pipe):
    blocking = client.ask(**LONG)
    prompts = ["a low hum", "wind in the trees " * 5, "a bell"]
    jobs = [client.ask(**SHORT | {"prompt": prompt}, seed=seed) for seed, prompt in enumerate(prompts)]
    dropped = client.ask(**SHORT)
    client.delete(dropped["url"])
    client.delete(blocking["url"])
    done = [client.done(job) for job in jobs]
    assert len({job["started"] for job in done}) == 1
    for seed, (prompt, job) in enumerate(zip(prompts, done)):
        expected = pipe.generate(**SHORT | {"prompt": prompt}, seed=seed).channels[0, 0]
        assert np.abs(heard(client, job)[0] - expected).max() <= 1e-4 * np.abs(expected).max() + 2**-15


def test_a_lora_is_asked_for_by_its_name(pipe, tmp_path):
    pipe.loras["soft"] = Path(make(pipe, tmp_path / "soft.safetensors"))
    try:
        with serving(pipe) as client:
            plain, with_it = (client.done(client.ask(**SHORT, seed=1, lora=lora)) for lora in ([], [["soft", 0.5]]))
            expected = pipe.generate(**SHORT, seed=1, lora=[("soft", 0.5)]).channels[0, 0]
            assert np.abs(heard(client, with_it)[0] - expected).max() <= 2**-15
            assert np.abs(heard(client, plain)[0] - expected).max() > 2**-10
            assert client.get("/v1/capabilities").json()["loras"] == sorted(pipe.loras)
            error = client.ask(400, **SHORT, lora=["soft.safetensors"])["error"]
            assert error["message"].startswith("lora must be of ") and error["param"] == "lora"
    finally:
        del pipe.loras["soft"]
