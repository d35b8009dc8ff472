"""Stages, FLOP, memory and traces, on the tiny model; the command `ldm2 profile`."""

from __future__ import annotations

import json
import mmap

import pytest
import torch
import torch.nn.functional as F

import ldm2
from ldm2.cli import profile
from ldm2.cli.commands import main
from ldm2.runtime import profiling
from ldm2.runtime.profiling import Limits, Measured, Work
from ldm2.settings import Settings
from ldm2.unet import UNet

CPU = torch.device("cpu")
ARGUMENTS = ("profile", "--random", "tiny", "--seconds", "0.2", "--steps", "3", "--repeats", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def works():
    """The stages of a short generation with the bundled model."""
    settings = Settings("a low tone", seconds=0.2, steps=3, seed=0).resolved()
    return profiling.works(ldm2.load("tiny", device="cpu"), settings)


@pytest.fixture
def quick(monkeypatch):
    """The command line without the time that measuring the machine takes."""
    monkeypatch.setattr(profiling, "limits", lambda device, dtype: Limits(1e9, 1e9))


def test_a_multiply_add_counts_twice():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert profiling.flop_of(lambda: a @ b) == 2 * 3 * 5 * 7


def test_convolutions_count():
    x, weight = torch.ones(1, 4, 10, 6), torch.ones(8, 4, 3, 3)
    assert profiling.flop_of(lambda: F.conv2d(x, weight, padding=1)) == 2 * 8 * 10 * 6 * 4 * 9


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attention_counts_as_two_matrix_products(context):
    @context()
    def attend():
        return F.scaled_dot_product_attention(*(torch.ones(2, 3, length, 8) for length in (16, 20, 20)))

    assert profiling.flop_of(attend) == 2 * (2 * 2 * 3 * 16 * 20 * 8)


def test_a_step_of_twice_the_length_costs_twice_and_more(works):
    pipe = ldm2.load("tiny", device="cpu")
    costs = [profiling.flop_of(profiling.works(pipe, Settings("a", seconds=seconds, steps=3, seed=0).resolved())[2].run)
             for seconds in (0.64, 1.28)]
    assert 2 * costs[0] < costs[1] < 3 * costs[0]


@pytest.mark.skipif(not profiling.Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_memory_is_what_a_call_takes_at_most():
    def take(num_bytes: int):
        with mmap.mmap(-1, num_bytes) as block:            # of the system, whatever the heap has to spare
            for page in range(0, num_bytes, mmap.PAGESIZE):
                block[page] = 1

    profiling.memory_of(lambda: take(120_000_000), CPU)                      # an earlier, higher peak
    assert 38e6 < profiling.memory_of(lambda: take(40_000_000), CPU) < 60e6


def test_the_median_counts_and_a_wide_spread_is_told(monkeypatch):
    spent = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(profiling, "seconds_of", lambda run, device: next(spent))
    row = profiling.measure(Work("x", lambda: None, calls=4), CPU, repeats=3)
    assert (row.seconds, row.slowest, row.calls, row.is_wide) == (2.0, 3.0, 4, True)


def test_the_rate_is_flop_per_second():
    assert Measured("x", 1, 0.5, 0.5, 1000, 0, None).flop_rate == 2000


def test_limits_are_rates():
    found = profiling.limits(CPU, torch.float32, at_least=0)
    assert 1e8 < found.flop_rate < 1e14 and 1e8 < found.copy_rate < 1e13


def test_a_cpu_that_is_faster_in_float32_has_that_as_its_limit(monkeypatch):
    rates = {torch.float32: 140e9, torch.bfloat16: 1e9}
    monkeypatch.setattr(profiling, "_product_rate", lambda device, dtype, at_least: rates[dtype])
    assert profiling.limits(CPU, torch.bfloat16, at_least=0).flop_rate == 140e9


def test_the_stages_of_a_generation_can_be_run_one_by_one_and_again(works):
    assert [work.name for work in works] == [
        "text", "keys, values, times", "UNet step", "guidance, sampler", "VAE", "vocoder"
    ]
    for work in works:
        first, second = work.run(), work.run()
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, second) and torch.isfinite(first).all()


def test_a_generation_takes_as_many_unet_steps_as_it_has_timesteps(works):
    assert [work.calls for work in works] == [1, 1, 3, 1, 1, 1]


def test_operations_are_counted_for_a_whole_generation_the_most_expensive_first():
    a = torch.ones(300, 300)
    found = profiling.operations([Work("once", lambda: a @ a), Work("five times", lambda: a @ a, calls=5)], CPU)
    assert next(operation.calls for operation in found if operation.name == "aten::mm") == 6
    assert [operation.seconds for operation in found] == sorted((o.seconds for o in found), reverse=True)


def test_profile_prints_a_line_for_each_stage(quick, capsys):
    assert main(list(ARGUMENTS)) == 0
    out = capsys.readouterr().out
    for words in ("random tiny, float32 on cpu", "1 x 0.2 s, 3 steps", "UNet step", "vocoder", "aten::"):
        assert words in out


def test_profile_compiles_a_random_model_where_asked(quick, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr("ldm2.runtime.compilation.compile_step", compiled.append)
    monkeypatch.setattr("ldm2.runtime.compilation.check_compiler", compiled.append)
    assert main([*ARGUMENTS, "--compile"]) == 0
    assert compiled[0] == CPU and isinstance(compiled[1], UNet)


def test_profile_prints_json(quick, capsys):
    assert main([*ARGUMENTS, "--json", "--batch", "2", "--dtype", "bfloat16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["about"]["batch"] == 2 and found["about"]["dtype"] == "bfloat16"
    step = next(stage for stage in found["stages"] if stage["name"] == "UNet step")
    assert step["calls"] == 3 and step["flop"] > 0 and step["share"] == pytest.approx(step["flop_rate"] / 1e9)
    assert found["seconds"] == pytest.approx(sum(stage["calls"] * stage["seconds"] for stage in found["stages"]))


def test_profile_writes_a_trace_with_the_stages_in_it(quick, capsys, tmp_path):
    path = tmp_path / "trace.json"
    assert main([*ARGUMENTS, "--trace", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"text", "UNet step", "vocoder"} <= names
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize("wrong, words", [
    (("--trace", "trace.txt"), ".json"),
    (("--trace", "nowhere/trace.json"), "nowhere"),
    (("--seconds", "0"), "seconds"),
    (("--repeats", "0"), "repeats"),
    (("--low-memory",), "--low-memory"),
    (("--model", "tiny"), "--model tiny exclude"),
    (("--revision", "v1"), "--revision v1 exclude"),
    (("--tokenizers", "folder"), "--tokenizers folder exclude"),
])
def test_profile_refuses_what_it_cannot_do(quick, capsys, tmp_path, monkeypatch, wrong, words):
    monkeypatch.chdir(tmp_path)
    assert main([*ARGUMENTS, *wrong]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and words in error[0]
    assert not list(tmp_path.iterdir())


def test_an_existing_trace_is_kept_unless_it_may_be_replaced(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("{}")
    with pytest.raises(FileExistsError, match=r"trace\.json exists"):
        profile.check_trace(path, overwrite=False)
    assert profile.check_trace(path, overwrite=True) == path
