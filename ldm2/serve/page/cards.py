"""Jobs as HTML: how far one is, why it failed, and a card for each sound of it."""

from __future__ import annotations

from html import escape
from typing import Any

from ldm2.serve.page.api import Job

FORMATS = ("flac", "wav", "mp3")
EMPTY = "<p class='ldm2-empty'>{}</p>"


def progress(job: Job) -> str:
    """Where a job is: its place in the queue, or stage, step and time left."""
    if job["status"] == "queued":
        place = job.get("queue_position") or 1
        ahead = "next in the queue" if place == 1 else f"number {place} in the queue"
        return _bar(f"Waiting: {ahead}", None)
    stage, step, total = job.get("stage") or "starting", job.get("step") or 0, job.get("total") or 0
    words = stage.capitalize() + (f": step {step} of {total}" if total > 1 else "")
    left = job.get("seconds_left")
    if left is not None:
        words += f" · {_time(left)} left"
    return _bar(words, step / total if total else None)


def _bar(words: str, share: float | None) -> str:
    """A bar with words above it; without a share it only shows that something goes on."""
    value = "" if share is None else f" value='{share:.4f}'"
    return f"<div class='ldm2-status' role='status'><span>{escape(words)}</span><progress{value}></progress></div>"


def _time(seconds: float) -> str:
    """A length of time in words."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def note(words: str) -> str:
    """A line that tells something."""
    return f"<div class='ldm2-status' role='status'><span>{escape(words)}</span></div>"


def failure(words: str) -> str:
    """A line that tells what went wrong."""
    return f"<div class='ldm2-status ldm2-error' role='alert'><span>{escape(words)}</span></div>"


def cards(job: Job) -> str:
    """The candidates of a finished job side by side, best first."""
    several = len(job["results"]) > 1
    return f"<div class='ldm2-cards'>{''.join(_card(job, sound, several) for sound in job['results'])}</div>"


def _card(job: Job, sound: dict[str, Any], several: bool) -> str:
    """A sound: its picture, a player, what it is, and what can be done with it."""
    name, n, url = job["id"], sound["n"], sound["url"].lstrip("/")
    about = [f"{sound['seconds']:.2f} s", f"seed {sound['seed']}"]
    if sound.get("score") is not None:
        about.insert(0, f"CLAP {sound['score']:.3f}")
    best = "<b class='ldm2-best'>best</b>" if several and n == 1 else ""
    title = escape(str(job["settings"].get("prompt") or job["kind"]), quote=True)
    buttons = "".join(
        f"<button type='button' data-action='{action}' data-job='{name}' data-n='{n}' title='{tip}'>{word}</button>"
        for action, word, tip in (("change", "Change", "these settings, to change them"),
                                  ("edit", "Edit", "take this sound to the tab Edit")))
    links = "".join(f"<a download='{name}-{n}.{form}' href='{url}&amp;format={form}'>{form.upper()}</a>"
                    for form in FORMATS)
    return (f"<article class='ldm2-card'><img src='v1/jobs/{name}/spectrogram?n={n}' alt='spectrogram of {title}'>"
            f"<audio controls preload='metadata' src='{url}'></audio>"
            f"<p>{best}{escape(' · '.join(about))}</p><div class='ldm2-actions'>{buttons}{links}</div></article>")


def listed(jobs: list[Job]) -> str:
    """Every sound of a session, the newest first."""
    if not jobs:
        return EMPTY.format("Nothing yet. What you make in this window is listed here, while the server keeps it.")
    past = (f"<section><h3>{escape(_headline(job))}</h3>{cards(job)}</section>" for job in jobs)
    return f"<div class='ldm2-past'>{''.join(past)}</div>"


def _headline(job: Job) -> str:
    """A job in a line."""
    told = job["settings"]
    kind = "loop" if told.get("loop") else "" if job["kind"] == "generate" else job["kind"].replace("_", " ")
    return f"{kind}: {told.get('prompt') or 'without a prompt'}".removeprefix(": ")
