"""Tests of the server, where what it needs is installed."""

from __future__ import annotations

import importlib.util

import pytest

NEEDED = ("fastapi", "uvicorn", "multipart", "prometheus_client", "httpx")

if not all(map(importlib.util.find_spec, NEEDED)):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def pipe():
    import ldm2

    return ldm2.load("tiny")


@pytest.fixture(scope="module")
def client(pipe):
    from ldm2.serve.limits import Limits
    from tests.serve.client import serving

    with serving(pipe, Limits(queue=8, pending=8)) as client:
        yield client
