"""The rotation against Sylvester's construction, and its three promises: orthonormal, its own inverse, q·k kept."""

import pytest
import torch
from inputs import assert_close, assert_same_bits, normal, strided

import dsa_ref


def sylvester(D):
    """H(1) = [1], H(2n) = [[H, H], [H, -H]]: signs [D, D]."""
    signs = torch.ones(1, 1)
    while len(signs) < D:
        signs = torch.cat((torch.cat((signs, signs), dim=1), torch.cat((signs, -signs), dim=1)))
    return signs


@pytest.mark.parametrize("D", (1, 2, 32, 128))
@pytest.mark.parametrize("T", (1, 37))
def test_is_sylvesters_matrix(ops, device, poisoned, T, D):
    x = normal(T, D, device=device)
    assert_close(ops.hadamard(x), x.cpu().double() @ sylvester(D).double() / D**0.5, 1e-6)


def test_signs_are_exact(ops, device):
    """Of a unit matrix the rotation is the matrix itself; 64^-0.5 = 1/8 leaves nothing to round."""
    assert torch.equal(ops.hadamard(torch.eye(64, device=device)).cpu() * 8, sylvester(64))


@pytest.mark.parametrize("D", (32, 128))
def test_orthonormal_and_its_own_inverse(ops, device, D):
    q, k = (normal(9, D, seed=seed, device=device) for seed in (0, 1))
    turned_q, turned_k = ops.hadamard(q), ops.hadamard(k)
    assert_close(turned_q @ turned_k.T, q @ k.T, 1e-6)
    assert_close(ops.hadamard(turned_q), q, 1e-6)
    assert (turned_q - q).abs().max() > 1


def test_spreads_an_outlier(ops, device):
    x = torch.zeros(1, 128, device=device)
    x[0, 77] = 1000.0
    assert_close(ops.hadamard(x).abs(), torch.full((1, 128), 1000 / 128**0.5), 1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounds_once(ops, device, dtype):
    x = normal(37, 64, device=device).to(dtype)
    assert_same_bits(ops.hadamard(x), ops.hadamard(x.float()).to(dtype))


def test_forms_of_input(ops, device):
    x = normal(5, 3, 32, device=device)
    wanted = ops.hadamard(x)
    assert_same_bits(ops.hadamard(x[2, 1]), wanted[2, 1])
    assert_same_bits(ops.hadamard(x[:, 1]), wanted[:, 1])
    assert_same_bits(ops.hadamard(strided(x)), wanted)
    assert ops.hadamard(x[:0]).shape == (0, 3, 32)


def test_gradient():
    assert torch.autograd.gradcheck(dsa_ref.hadamard, normal(3, 16).double().requires_grad_())
