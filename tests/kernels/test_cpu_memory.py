"""Memory of results on the CPU: kept while somebody asks for it, and no longer."""

import multiprocessing
import threading

import pytest
import torch

import ldm2
from ldm2 import ops
from ldm2.runtime.memory import in_stage
from tests.helpers import draw

SIDE = 2048                                                # a result of SIDE rows has 16 MB


@pytest.fixture(scope="module")
def weight(library):
    return draw(SIDE, 16)


def product(weight, rows=SIDE):
    return ops.linear(draw(rows, 16, seed=rows), weight)


def assert_product(y, weight):
    exact = draw(len(y), 16, seed=len(y)).double() @ weight.double().T
    torch.testing.assert_close(y, exact.float(), atol=1e-5, rtol=0)


def idle():
    return torch.ops.ldm2_cpu.result_bytes()[1]


def live():
    return torch.ops.ldm2_cpu.result_bytes()[0]


def test_memory_of_a_result_that_is_gone_serves_the_next(weight):
    before = live()
    with ops.memory_kept("cpu"):
        first = product(weight)
        place, size = first.data_ptr(), live() - before
        assert idle() == 0 and size == 4 * SIDE * SIDE
        del first
        assert idle() == size
        again = product(weight)
        assert again.data_ptr() == place and idle() == 0 and live() - before == size
        assert_product(again, weight)
    del again
    assert (live(), idle()) == (before, 0)


def test_nothing_is_kept_outside(weight):
    before, y = live(), product(weight)
    assert live() - before == 4 * SIDE * SIDE
    del y
    assert (live(), idle()) == (before, 0)


def test_there_is_never_more_than_was_needed_at_once(weight):
    before, most = live(), 0
    with ops.memory_kept("cpu"):
        for rows in (2048, 1024, 4096, 1500, 3000, 2048, 5000, 512, 700, 900, 4096):
            y = product(weight, rows)
            most = max(most, live())
            del y
            assert live() == before and idle() + live() <= most
    assert idle() == 0


def test_small_results_are_left_to_pytorch(weight):
    before = torch.ops.ldm2_cpu.result_bytes()
    with ops.memory_kept("cpu"):
        y = product(weight, 64)
        assert y.numel() and torch.ops.ldm2_cpu.result_bytes() == before


def test_a_result_outlives_its_keeper(weight):
    with ops.memory_kept("cpu"):
        y = product(weight)
    with ops.memory_kept("cpu"):
        other = product(weight, SIDE + 1)
    assert_product(y, weight)
    assert other.data_ptr() != y.data_ptr()


def test_keepers_may_be_nested(weight):
    with ops.memory_kept("cpu"):
        with ops.memory_kept("cpu"):
            product(weight)
        assert idle() > 0
    assert idle() == 0


def test_an_error_inside_keeps_nothing(weight):
    with pytest.raises(ZeroDivisionError), ops.memory_kept("cpu"):
        product(weight)
        1 / 0  # noqa: B018
    assert idle() == 0


def test_more_given_up_than_kept_is_refused(library):
    with pytest.raises(RuntimeError, match="more often"):
        library.keep_memory(False)
    with ops.memory_kept("cpu"):                           # and does no harm
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_memory_held_before_never_shows(library, dtype):
    x, w = draw(1, 64, 64, 160).to(dtype).contiguous(memory_format=torch.channels_last), draw(64, 64, 3, 3).to(dtype)
    norm = draw(64).to(dtype)
    sequence, taps = draw(1, 64, 20_000).to(dtype), draw(64, 64, 7).to(dtype)
    operations = [lambda: ops.conv3x3(x, w, norm), lambda: ops.group_norm(x, 8, norm, norm, 1e-5),
                  lambda: ops.conv1d(sequence, taps, norm), lambda: ops.conv1d(sequence.mT.contiguous().mT, taps, norm)]
    for operation in operations:
        expected = operation()
        with ops.memory_kept("cpu"):
            for _ in range(2):
                operation().fill_(float("nan"))            # goes back at once
                torch.testing.assert_close(operation(), expected, rtol=0, atol=0)


def test_pipelines_in_threads_share_it(weight):
    expected, found = product(weight), []

    def work():
        with ops.memory_kept("cpu"):
            found.extend(bool((product(weight) == expected).all()) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20 and idle() == 0


def _child(weight, results):
    torch.set_num_threads(1)
    with ops.memory_kept("cpu"):
        results.put(float(product(weight)[0, 0]))


def test_a_forked_process_goes_on_with_it(weight):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with ops.memory_kept("cpu"):
        expected = float(product(weight)[0, 0])
        child = context.Process(target=_child, args=(weight, results))
        child.start()
        assert results.get(timeout=60) == expected
        child.join(timeout=60)
    assert child.exitcode == 0


def test_a_stage_keeps_it(weight):
    @in_stage("vae")
    def work(pipe):
        product(weight)
        return idle()

    assert work(ldm2.load("tiny")) > 0 and idle() == 0


def test_plain_pytorch_and_other_devices_keep_nothing(weight):
    for backend, device in (("reference", "cpu"), ("auto", "meta")):
        with ops.backend(backend), ops.memory_kept(device):
            with ops.backend("auto"):
                product(weight)
            assert idle() == 0
