"""Memory of results on the CPU: what is idle serves later results, and goes back to the system in the end."""

import multiprocessing
import resource
import threading
import time

import pytest
import torch

import ldm2
from ldm2 import ops
from ldm2.runtime.memory import give_back
from tests.helpers import draw

SIDE = 2048                                                # a result of SIDE rows has 16 MB


@pytest.fixture(scope="module")
def weight(library):
    return draw(SIDE, 16)


@pytest.fixture(autouse=True)
def empty(library):
    library.keep_memory_for(600)                           # nothing is taken away meanwhile
    library.release_memory()
    yield
    library.release_memory()
    library.keep_memory_for(15)


def product(weight, rows=SIDE):
    return ops.linear(draw(rows, 16, seed=rows), weight)


def assert_product(weight, *results):
    for y in results:
        exact = draw(len(y), 16, seed=len(y)).double() @ weight.double().T
        torch.testing.assert_close(y, exact.float(), atol=1e-5, rtol=0)


def idle():
    return torch.ops.ldm2_cpu.result_bytes()[1]


def live():
    return torch.ops.ldm2_cpu.result_bytes()[0]


def test_memory_of_a_result_that_is_gone_serves_the_next(weight):
    before = live()
    first = product(weight)
    place, size = first.data_ptr(), live() - before
    assert idle() == 0 and size == 4 * SIDE * SIDE
    del first
    assert idle() == size
    again = product(weight)
    assert again.data_ptr() == place and idle() == 0 and live() - before == size
    assert_product(weight, again)
    del again
    assert (live(), idle()) == (before, size)


def test_there_is_never_more_than_was_needed_at_once(weight):
    before, most = live(), 0
    for rows in (2048, 1024, 4096, 1500, 3000, 2048, 5000, 512, 700, 900, 4096):
        y = product(weight, rows)
        most = max(most, live())
        assert live() + idle() <= most
        assert_product(weight, y)
        del y
        assert live() == before and idle() + live() <= most


def test_pages_of_many_results_make_a_large_one_and_the_other_way_round(weight):
    """And all are right, in whatever pieces their memory came."""
    before = live()
    small = [product(weight, rows) for rows in range(513, 525)]
    total = live() - before
    kept = small[1::2]                                     # so that no two neighbors are idle
    del small
    half = idle()
    assert total / 3 < half < total
    large = product(weight, half // (4 * SIDE))
    assert idle() == 0 and live() - before == total
    assert_product(weight, *kept, large)
    del large
    again = [product(weight, rows) for rows in range(600, 606)]
    assert live() - before == total and idle() == 0
    assert_product(weight, *kept, *again)


def test_idle_pages_are_not_made_again(weight):
    """Counted by the system: a page that is fresh is a fault when it is touched first."""

    def work():
        for rows in (2048, 4096, 1024, 3000):
            product(weight, rows)

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def counted():
        before = faults()
        work()
        return faults() - before

    work()
    warm = min(counted() for _ in range(3))
    cold = []
    for _ in range(3):
        torch.ops.ldm2_cpu.release_memory()
        cold.append(counted())
    assert min(cold) >= warm + 16                          # 32 MB in pages of 2 MB, of which one may cover two results


def test_small_results_are_left_to_pytorch(weight):
    before = torch.ops.ldm2_cpu.result_bytes()
    y = product(weight, 64)
    assert y.numel() and torch.ops.ldm2_cpu.result_bytes() == before


@pytest.mark.parametrize("release", [ops.release_memory, give_back])
def test_what_is_idle_goes_back_at_once_if_asked(weight, release):
    y = product(weight)
    product(weight, SIDE + 1)
    assert idle() > 0
    release()
    assert idle() == 0
    assert_product(weight, y)


def test_releasing_where_no_kernels_are_does_nothing(weight, monkeypatch):
    product(weight)
    before = idle()
    monkeypatch.setattr(ops, "_kernels", {"cpu": {}})
    ops.release_memory()
    assert idle() == before > 0


@pytest.mark.parametrize("seconds", [-0.5, float("nan")])
def test_memory_is_kept_for_no_less_than_no_time(library, seconds):
    with pytest.raises(ValueError, match=f"seconds.*{seconds}"):
        library.keep_memory_for(seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_memory_held_before_never_shows(library, dtype):
    x, w = draw(1, 64, 64, 160).to(dtype).contiguous(memory_format=torch.channels_last), draw(64, 64, 3, 3).to(dtype)
    norm = draw(64).to(dtype)
    sequence, taps = draw(1, 64, 20_000).to(dtype), draw(64, 64, 7).to(dtype)
    operations = [lambda: ops.conv3x3(x, w, norm), lambda: ops.group_norm(x, 8, norm, norm, 1e-5),
                  lambda: ops.conv1d(sequence, taps, norm), lambda: ops.conv1d(sequence.mT.contiguous().mT, taps, norm)]
    for operation in operations:
        library.release_memory()
        expected = operation()
        for _ in range(2):
            operation().fill_(float("nan"))                # goes back at once
            torch.testing.assert_close(operation(), expected, rtol=0, atol=0)


def test_threads_share_it(weight):
    expected, found = [product(weight, rows) for rows in range(600, 604)], []

    def work():
        for _ in range(5):
            found.extend(bool((product(weight, len(y)) == y).all()) for y in expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def waited(condition):
    """Whether it comes true in time."""
    until = time.monotonic() + 30
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def _child(weight, results):
    torch.set_num_threads(1)
    results.put(idle())
    torch.ops.ldm2_cpu.keep_memory_for(0.02)
    y = product(weight)
    results.put(float(y[0, 0]))
    del y
    results.put(waited(lambda: idle() == 0))
    product(weight)                                        # the thread has ended: another must begin
    results.put(waited(lambda: idle() == 0))


def test_a_forked_process_goes_on_without_what_is_idle(weight):
    """And looks after its own, which goes back to the system when nobody has needed it for a while."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    expected = float(product(weight)[0, 0])
    y = product(weight, SIDE // 2)
    assert idle() > 0
    child = context.Process(target=_child, args=(weight, results))
    child.start()
    assert [results.get(timeout=90) for _ in range(4)] == [0, expected, True, True]
    child.join(timeout=60)
    assert child.exitcode == 0 and idle() > 0
    assert_product(weight, y)


def test_a_part_that_leaves_memory_takes_idle_memory_along(weight):
    """low_memory holds to its peak: the results of one part do not lie beside the weights of the next."""
    pipe = ldm2.load("tiny", low_memory=True)
    with pipe.stages["vae"]:
        product(weight)
        assert idle() > 0
    assert idle() == 0


def test_plain_pytorch_takes_none_of_it(weight):
    before = live()
    with ops.backend("reference"):
        y = product(weight)
    assert y.numel() and (live(), idle()) == (before, 0)
