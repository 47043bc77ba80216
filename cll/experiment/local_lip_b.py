"""The training estimate of Local-Lip-B: local bounds of a batch by power iteration."""

import torch
import torch.nn.functional as F
from torch import nn

from ..bounds.layer import is_linear
from ..bounds.linear import apply_adjoint, apply_linear
from ..bounds.network import head_rows
from ..bounds.trace import leaves
from ..certify.folds import ACTIVATIONS
from ..layers.activations import ClampedMaxMin


def local_estimate(net, images, epsilon, iterations=2):
    """Training estimate of one K per sample, (N, C, C) in the type of the weights, differentiable.

        K_nij = 1 / min(input_std) * prod_l ||M'_nl W_l M_nl|| * ||(w_i - w_j) M_n||

    for the ball of radius epsilon around image n (Huang et al., NeurIPS 2021, "Training certifiably
    robust neural networks with efficient local Lipschitz bounds"). The masks M of the inputs of a
    layer leave out elements that ReLU or ClampedMaxMin holds constant in the ball; the masks M' of
    its outputs leave out pre-activations that reach no other elements.

    Box and ball decide what is constant. A pre-activation lies in a box, by interval arithmetic,
    and within R ||w|| of its value at the image, for its row w and R the product of epsilon and
    the masked norms so far; the two are intersected.

    net: cll.LipschitzNet of Conv2d, Linear, Flatten and MaxMin, ClampedMaxMin or ReLU after them.
    images: (N, *input_shape), un-normalised; epsilon: float or 0-dim tensor, in input units.
    iterations: steps of power iteration, first on the network's own vectors (in place, as in
    net.estimate_lipschitz_matrix: call one of the two per training step), then for each sample
    from there.

    Masks and vectors are held constant: the gradient flows through the weights in the norms
    (envelope theorem, see bounds.estimate). An estimate, every norm of it from below: for
    certificates use `local_lipschitz`. Runs under torch.func.vmap over stacked weights.
    Raises TypeError for any other layer.
    """
    if iterations:
        with torch.no_grad():
            net.body_lipschitz(iterations)
    layers = [layer for _, layer in leaves(net.body)]
    vectors = iter([v for *_, v in net.linear_layers()])
    with torch.autocast(images.device.type, enabled=False), torch.no_grad():
        like, channels = next(net.parameters()), (-1, *[1] * (images.ndim - 2))
        scale, mean = (1 / net.std.to(like)).view(channels), net.mean.to(like).view(channels)
        h = (images.to(scale.dtype) - mean) * scale  # (N, *shape)
        h = h.expand(len(images), *net.input_shape)
        box = (epsilon * scale).expand_as(h)
        low, high, live = h - box, h + box, torch.ones_like(h)
        product = scale.max().expand(len(h))  # (N,)
    with torch.autocast(images.device.type, enabled=False):
        for i, layer in enumerate(layers):
            follower = layers[i + 1] if i + 1 < len(layers) else None
            if isinstance(layer, (nn.Flatten, nn.Identity)):
                h, low, high, live = (layer(t) for t in (h, low, high, live))
            elif is_linear(layer):
                with torch.no_grad():
                    state = _pre_activation(layer, h, low, high, epsilon * product)
                    inputs, (h, low, high, outputs) = live, _activate(follower, *state)
                    reached, live = outputs
                v = next(vectors)
                product = product * _masked_norm(layer, v, inputs, reached, iterations)
            elif not (isinstance(layer, ACTIVATIONS) and i and is_linear(layers[i - 1])):
                raise TypeError(
                    f"no local estimate for {layer} here: it knows Conv2d, Linear, Flatten, and "
                    "MaxMin, ClampedMaxMin or ReLU right after Conv2d or Linear"
                )
        rows = head_rows(net.head)
        square = (rows[:, None] - rows).square().flatten(0, 1)  # (C * C, features)
        square = live.square() @ square.mT
        distances = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
        return product[:, None, None] * distances.unflatten(1, (len(rows), len(rows)))


def _pre_activation(layer, h, low, high, R):
    """(z, low, high, difference): the value at the image, the box around it, (N, *shape), and how
    far a - b may move for each pair of channels, (N, C/2, ...)."""
    middle, radius = (low + high) / 2, (high - low) / 2
    bias = layer.bias
    bias = 0 if bias is None else bias.view(-1, *[1] * (h.ndim - 2))
    z, middle = apply_linear(layer, layer.weight, torch.cat([h, middle])).chunk(2)
    z, middle = z + bias, middle + bias
    radius = apply_linear(layer, layer.weight.abs(), radius)
    R = R.view(-1, *[1] * (h.ndim - 1))
    ball = R * _row_norms(layer.weight, h.ndim)
    low, high = torch.maximum(middle - radius, z - ball), torch.minimum(middle + radius, z + ball)
    if layer.weight.shape[0] % 2:
        return z, low, high, None
    difference = R * _row_norms(layer.weight[0::2] - layer.weight[1::2], h.ndim)
    return z, low, high, difference


def _row_norms(weight, ndim):
    """Norms of the rows of a Linear or Conv2d weight, broadcast to (1, C, ...); at the border of a
    zero-padded image the rows are shorter."""
    return weight.flatten(1).norm(dim=1).view(1, -1, *[1] * (ndim - 2))


def _activate(layer, z, low, high, difference):
    """(h, low, high, (reached, live)) after an activation (or none): masks of the pre-activations
    that reach an element that may change, and of the elements that may change."""
    if not isinstance(layer, ACTIVATIONS):
        return z, low, high, (torch.ones_like(z), torch.ones_like(z))
    if isinstance(layer, nn.ReLU):
        live = (high > 0).to(z.dtype)
        return F.relu(z), F.relu(low), F.relu(high), (live, live)
    a, b = z.unflatten(1, (-1, 2)).unbind(2)
    first = a - b + difference >= 0  # a may be the larger one
    second = b - a + difference >= 0
    (a_low, b_low), (a_high, b_high) = (t.unflatten(1, (-1, 2)).unbind(2) for t in (low, high))
    first, second = first & (a_high >= b_low), second & (b_high >= a_low)
    h, low, high = (torch.cat(_sorted(t), 1) for t in (z, low, high))
    if not isinstance(layer, ClampedMaxMin):
        return h, low, high, (torch.ones_like(z), torch.ones_like(z))
    (top, bottom), (top_low, bottom_low), (top_high, bottom_high) = (
        t.chunk(2, 1) for t in (h, low, high)
    )
    top_live, bottom_live = top_low < layer.high, bottom_high > layer.low
    reached = torch.stack(
        [first & top_live | second & bottom_live, second & top_live | first & bottom_live], 2
    )
    live = torch.cat([top_live, bottom_live], 1)

    def clamp(top, bottom):
        return torch.cat([torch.minimum(top, layer.high), torch.maximum(bottom, layer.low)], 1)

    return (
        clamp(top, bottom),
        clamp(top_low, bottom_low),
        clamp(top_high, bottom_high),
        (reached.flatten(1, 2).to(z.dtype), live.to(z.dtype)),
    )


def _sorted(x):
    a, b = x.unflatten(1, (-1, 2)).unbind(2)
    return torch.maximum(a, b), torch.minimum(a, b)


def _masked_norm(layer, v, inputs, outputs, iterations):
    """Estimate of ||diag(outputs) W diag(inputs)|| for masks (N, *shape), from one vector v: (N,),
    differentiable in the weight; 0 where the masks leave nothing."""
    with torch.no_grad():
        weight = layer.weight
        v = _unit(v * inputs)
        for _ in range(iterations):
            y = apply_linear(layer, weight, v) * outputs
            square = apply_adjoint(layer, weight, y, inputs.shape[1:]) * inputs
            v = _unit(torch.add(square, v, alpha=1e-16))
    y = apply_linear(layer, layer.weight, v) * outputs
    return torch.linalg.vector_norm(y.flatten(1), dim=1)


def _unit(v):
    norm = torch.linalg.vector_norm(v.flatten(1), dim=1)
    return v / torch.where(norm > 0, norm, 1).view(-1, *[1] * (v.ndim - 1))
