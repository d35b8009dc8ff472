"""Convolutions that stay as they are: results and gradients against PyTorch's own."""

import pytest
import torch
from torch.nn import functional as F

from ldm2.layers import Conv3x3
from ldm2.training.frozen import hasten


@pytest.mark.parametrize("shape", [(2, 64, 16, 8), (1, 16, 5, 3), (1, 128, 32, 2)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_frozen_convolution_gives_the_gradients_of_autograd(shape, with_residual):
    generator = torch.Generator().manual_seed(0)
    conv = Conv3x3(shape[1], 2 * shape[1]).requires_grad_(False)
    hasten(conv)
    x = torch.randn(shape, generator=generator).requires_grad_()
    residual = torch.randn(shape[0], 2 * shape[1], *shape[2:], generator=generator).requires_grad_()
    y = conv(x, residual if with_residual else None)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1) + (residual if with_residual else 0)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    wanted = (x, residual) if with_residual else (x,)
    seed = torch.randn(y.shape, generator=generator)
    for a, b in zip(torch.autograd.grad(y, wanted, seed), torch.autograd.grad(expected, wanted, seed)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_convolution_that_learns_is_left_to_autograd():
    conv = Conv3x3(4, 4)
    hasten(conv)
    conv(torch.ones(1, 4, 3, 3)).sum().backward()
    assert conv.weight.grad is not None


def test_autocast_chooses_the_dtype_in_both_directions():
    conv = Conv3x3(32, 32).requires_grad_(False).bfloat16()
    hasten(conv)
    x = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    expected = torch.autograd.grad(F.conv2d(x, conv.weight.float(), conv.bias.float(), padding=1).square().sum(), x)
    torch.testing.assert_close(grad, expected[0], rtol=0.1, atol=0.1)
