"""Layers that the certificates know and PyTorch lacks."""

import torch
from torch import nn


class MaxMin(nn.Module):
    """Sort pairs of channels: (N, C, ...) -> (N, C, ...), all C/2 maxima first, then all minima.

    Channels (2i, 2i + 1) form a pair. On each pair the layer is (a, b) -> (max, min): continuous,
    and everywhere a permutation of the pair, hence 1-Lipschitz in the L2 norm and, unlike ReLU,
    without loss of gradient norm. On a tie the gradient is that of the identity, also a
    permutation. The order of the outputs is that of the paper's published weights.

    Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
    Raises ValueError for an odd number of channels.
    """

    def forward(self, x):
        if x.ndim < 2 or x.shape[1] % 2:
            raise ValueError(
                f"MaxMin pairs the channels of dimension 1 and got shape {tuple(x.shape)}: "
                "use an even number of channels"
            )
        if x.ndim > 2:
            return _SortPairs.apply(x)[0]
        a, b = x.unflatten(1, (-1, 2)).unbind(2)  # (N, C/2) each
        in_order = a >= b
        return torch.cat([torch.where(in_order, a, b), torch.where(in_order, b, a)], 1)


class _SortPairs(torch.autograd.Function):
    """MaxMin for images: one saved bool per pair, twice as fast as autograd through `where`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        a, b = x.unflatten(1, (-1, 2)).unbind(2)  # (N, C/2, ...) each
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1), a >= b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        (in_order,) = ctx.saved_tensors
        high, low = gradient.chunk(2, 1)
        pair = torch.where(in_order, high, low), torch.where(in_order, low, high)
        return torch.stack(pair, 2).flatten(1, 2)
