import torch
from torch.nn import functional as F

from kd_d2.modeling.layers import L2Norm


def test_values_by_hand_and_learnable_scale():
    layer = L2Norm(2, init=10.0)
    x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([6.0, 8.0]))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([10.0, 1.0]))
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([6.0, 0.8]))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.tensor([0.6, 0.8]))


def test_equals_torch_and_does_not_depend_on_the_scale_of_the_input():
    x = torch.randn(2, 16, 5, 4, generator=torch.Generator().manual_seed(0))
    layer = L2Norm(16)
    torch.testing.assert_close(layer(x), 20 * F.normalize(x, dim=1))
    torch.testing.assert_close(layer(x), layer(100 * x))


def test_dead_position_and_half_precision():
    layer = L2Norm(4)
    x = torch.zeros(1, 4, 1, 2)
    x[..., 1] = 300.0  # squares overflow fp16
    x = x.half().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.float16 and y[0, :, 0].tolist() == [[0.0, 10.0]] * 4
    y.float().sum().backward()
    assert torch.isfinite(x.grad[..., 1]).all()
