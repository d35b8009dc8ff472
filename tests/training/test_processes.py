"""Several processes that train together."""

import torch
import torch.multiprocessing as mp

from ldm2.training import loop


def gradients(number, count, folder):
    """What one of `count` processes has after a step's backward pass and the exchange: the first writes it."""
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=number, world_size=count)
    module = torch.nn.Linear(3, 1)
    torch.nn.init.ones_(module.weight), torch.nn.init.zeros_(module.bias)
    rows = torch.arange(12.0).reshape(4, 3).split(4 // count)[number]
    ((module(rows) - 1) ** 2).mean().backward()
    loop._share_gradients(list(module.parameters()))
    if number == 0:
        torch.save([p.grad for p in module.parameters()], f"{folder}/{count}.pt")
    if count > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(tmp_path):
    mp.spawn(gradients, (2, tmp_path), nprocs=2)
    gradients(0, 1, tmp_path)
    two, one = (torch.load(tmp_path / f"{count}.pt") for count in (2, 1))
    for a, b in zip(two, one):
        torch.testing.assert_close(a, b)
