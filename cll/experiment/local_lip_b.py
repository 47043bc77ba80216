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

    net: cll.LipschitzNet of Conv2d, Linear, Flatten and MaxMin, ClampedMaxMin or ReLU after them;
    TypeError for any other layer. images: (N, *input_shape), un-normalised; epsilon: float or 0-dim
    tensor, in input units. iterations: of power, first on the network's vectors (in place, as in
    net.estimate_lipschitz_matrix: call one of the two per training step), then for each sample.

    Masks and vectors are held constant: the gradient flows through the weights in the norms
    (envelope theorem, see bounds.estimate). An estimate, every norm of it from below: for
    certificates use `local_lipschitz`. Runs under torch.func.vmap over stacked weights.
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
                    R = (epsilon * product).view(-1, *[1] * (h.ndim - 1))
                    box = _pre_activation(layer, h, low, high, R)
                    inputs, (reached, live) = live, _changing(follower, layer, *box, R)
                    # activations rise with every element: a box goes through by its corners
                    h, low, high = map(follower, box) if isinstance(follower, ACTIVATIONS) else box
                norm = _masked_norm(layer, next(vectors), inputs, reached, iterations)
                product = product * norm
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
    """(z, low, high), (N, *shape): a linear layer at the image, and the box around that."""
    inputs = torch.cat([h, (low + high) / 2])
    bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (h.ndim - 2))
    z, middle = (apply_linear(layer, layer.weight, inputs) + bias).chunk(2)
    radius = apply_linear(layer, layer.weight.abs(), (high - low) / 2)
    ball = R * _row_norms(layer.weight, h.ndim)
    return z, torch.maximum(middle - radius, z - ball), torch.minimum(middle + radius, z + ball)


def _row_norms(weight, ndim):
    """Norms of the rows of a Linear or Conv2d weight, broadcast to (1, C, ...); at the border of a
    zero-padded image the rows are shorter."""
    return weight.flatten(1).norm(dim=1).view(1, -1, *[1] * (ndim - 2))


def _changing(follower, layer, z, low, high, R):
    """Masks (reached, live) of the pre-activations that reach an element which may change, and of
    the elements of the activation that may change; layer: the linear one before it."""
    if isinstance(follower, nn.ReLU):
        live = (high > 0).to(z.dtype)
        return live, live
    if not isinstance(follower, ClampedMaxMin):
        return torch.ones_like(z), torch.ones_like(z)
    (a, b), (a_low, b_low), (a_high, b_high) = (t.chunk(2, 1) for t in (z, low, high))
    first, second = layer.weight.chunk(2)  # rows; those of two groups have inputs of their own
    apart = first - second if getattr(layer, "groups", 1) == 1 else torch.cat([first, second], 1)
    difference = R * _row_norms(apart, z.ndim)  # how far a - b may move
    first = (a - b + difference >= 0) & (a_high >= b_low)  # a may be the larger one
    second = (b - a + difference >= 0) & (b_high >= a_low)
    top_live = torch.maximum(a_low, b_low) < follower.high
    bottom_live = torch.minimum(a_high, b_high) > follower.low
    reached = first & top_live | second & bottom_live, second & top_live | first & bottom_live
    return torch.cat(reached, 1).to(z.dtype), torch.cat([top_live, bottom_live], 1).to(z.dtype)


def _masked_norm(layer, v, inputs, outputs, iterations):
    """Estimate of ||diag(outputs) W diag(inputs)|| for masks (N, *shape), from one vector v: (N,),
    differentiable in the weight; 0 where the masks leave nothing."""

    def unit(v):
        return F.normalize(v.flatten(1), eps=torch.finfo(v.dtype).tiny).view_as(v)

    with torch.no_grad():
        v = unit(v * inputs)
        for _ in range(iterations):
            y = apply_linear(layer, layer.weight, v) * outputs
            square = apply_adjoint(layer, layer.weight, y, inputs.shape[1:]) * inputs
            v = unit(torch.add(square, v, alpha=1e-16))
    y = apply_linear(layer, layer.weight, v) * outputs
    return torch.linalg.vector_norm(y.flatten(1), dim=1)
