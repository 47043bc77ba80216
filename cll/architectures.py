"""The networks of the paper by name, and the shape every network of this kit has.

A classifier is `head(body(x))`: a body of layers whose Lipschitz constants multiply, and a linear
head whose rows enter pairwise, so that one matrix K bounds every margin:

    K[i, j] = 1 / min(input_std) * prod_l ||W_l||_2 * ||w_i - w_j||_2        (paper, eq. 1)
"""

import difflib
import math

import torch
from torch import nn

from .bounds import estimate, is_linear, layer_inputs, operator_norm, pairwise_distances
from .layers import MaxMin

__all__ = ["LipschitzNet", "build"]


class LipschitzNet(nn.Module):
    """A classifier that can say how fast its margins change.

    body: nn.Sequential of layers with a known Lipschitz bound, ending in features (N, d).
    head: nn.Linear(d, C).
    input_shape: shape of one input, (C, H, W) or (features,).
    input_std, input_mean: float or one value per channel; the network sees (x - mean) / std, and
        K carries the factor 1 / min(std), so that it bounds changes of the un-normalised x.

    The training estimate keeps one vector per linear layer (a buffer, in the shape of the
    layer's input) on which power iteration goes on from step to step.
    """

    def __init__(self, body, head, input_shape, input_std=1.0, input_mean=0.0):
        super().__init__()
        self.body, self.head = body, head
        self.input_shape = tuple(input_shape)
        channels = (-1,) + (1,) * (len(self.input_shape) - 1)
        for name, value in (("std", input_std), ("mean", input_mean)):
            self.register_buffer(name, torch.as_tensor(value).float().reshape(channels), False)
        if not (torch.isfinite(self.std).all() and self.std.min() > 0):
            raise ValueError(f"input_std must be positive and finite, got {input_std}")
        # The buffers' own values, after rounding to float32: K must fit what forward divides by.
        self.input_std, self.input_mean = self.std.flatten().tolist(), self.mean.flatten().tolist()
        self.normalises = bool((self.std != 1).any() or (self.mean != 0).any())
        self._layers = [(name, shape) for name, _, shape in layer_inputs(body, self.input_shape)]
        for i, (name, shape) in enumerate(self._layers):
            if is_linear(body.get_submodule(name)):
                weight = body.get_submodule(name).weight
                v = torch.randn(shape, device=weight.device, dtype=weight.dtype)
                self.register_buffer(f"v{i}", v)

    def forward(self, x):
        """Logits (N, C) of un-normalised inputs x (N, *input_shape) in [0, 1]."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"wrong input shape {tuple(x.shape)}: this network takes (N, "
                f"{', '.join(map(str, self.input_shape))})"
            )
        if self.normalises:
            x = (x - self.mean) / self.std
        return self.head(self.body(x))

    def body_lipschitz(self, iterations=5, through=False):
        """Training estimate of the Lipschitz constant of x -> body(x): a differentiable scalar.

        Advances the warm-started power iteration of each linear layer by `iterations` steps (0
        re-uses the vectors); through: see bounds.estimate. An estimate from below: for
        certificates use `cll.lipschitz_matrix(model, "guaranteed")`.
        """
        constant = 1 / self.std.min()
        for i, (name, shape) in enumerate(self._layers):
            layer = self.body.get_submodule(name)
            if is_linear(layer):
                v = getattr(self, f"v{i}")
                # a copy: with `through`, the backward pass needs v as it was before copy_ below
                sigma, v_new = estimate(layer, v.clone(), iterations, through)
                if iterations:
                    v.copy_(v_new)
            else:
                sigma = operator_norm(layer, shape, "power")
            constant = constant * sigma
        return constant

    def lipschitz_matrix(self, iterations=5, through=False):
        """Training estimate of K, shape (C, C), differentiable in all weights (paper, eq. 1)."""
        return self.body_lipschitz(iterations, through) * pairwise_distances(self.head.weight)


# Each convolution: channels, kernel, stride, padding.  Sources: the official code's
# configurations; 4C3F has 3x3 kernels at its strided layers, unlike other papers' 4C3F (4x4).
_CONVOLUTIONS = {
    "4C3F": [(32, 3, 1, 1), (32, 3, 2, 1), (64, 3, 1, 1), (64, 3, 2, 1)],
    "6C2F": [(32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1)]
    + [(64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)],
    "8C2F": [(64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 0), (128, 3, 1, 1), (128, 3, 1, 1)]
    + [(128, 4, 2, 0), (256, 3, 1, 1), (256, 4, 2, 0)],
    "MLP": [],
}
_HIDDEN = {"4C3F": [512, 512], "6C2F": [512], "8C2F": [256], "MLP": [10, 20, 40, 40, 20, 10]}


def build(name, num_classes=10, input_shape=(3, 32, 32), input_std=1.0, input_mean=0.0):
    """A network of the paper with Kaiming normal weights and zero biases.

    name: "4C3F", "6C2F" (CIFAR), "8C2F" (Tiny-ImageNet) or "MLP" (two moons; 3,782 parameters).
    Raises ValueError for an unknown name or an input too small for the network.
    Draws from torch's global generator: seed with torch.manual_seed.
    """
    if name not in _CONVOLUTIONS:
        nearest = difflib.get_close_matches(str(name), _CONVOLUTIONS, 1, cutoff=0)[0]
        raise ValueError(
            f"unknown network {name!r}; nearest: {nearest!r} (known: {', '.join(_CONVOLUTIONS)})"
        )
    input_shape = tuple(input_shape)
    if _CONVOLUTIONS[name] and len(input_shape) != 3:
        raise ValueError(
            f"{name} takes images of shape (channels, height, width), got {input_shape}"
        )
    layers, shape = [], input_shape
    for channels, kernel, stride, padding in _CONVOLUTIONS[name]:
        size = [(n + 2 * padding - kernel) // stride + 1 for n in shape[1:]]
        if min(size) < 1:
            raise ValueError(f"input {input_shape} is too small for {name}")
        layers += [nn.Conv2d(shape[0], channels, kernel, stride, padding), MaxMin()]
        shape = (channels, *size)
    if len(shape) > 1:
        layers.append(nn.Flatten())
    features = math.prod(shape)
    for width in _HIDDEN[name]:
        layers += [nn.Linear(features, width), MaxMin()]
        features = width
    head = nn.Linear(features, num_classes)
    for layer in [*layers, head]:
        if is_linear(layer):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return LipschitzNet(nn.Sequential(*layers), head, input_shape, input_std, input_mean)
