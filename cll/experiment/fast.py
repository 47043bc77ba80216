"""Stacks of small multilayer perceptrons, in as few operations as there are.

A step of a network with a few thousand weights takes as long as the number of its operations,
whatever these compute: seven layers under torch.func.vmap are 1,400 of them. Here a layer of all
runs is one batched product, samples lie last so that MaxMin works on whole rows, the backward pass
of the network is written out, and the power iterations of all layers run as one, on matrices
padded to a common size. The mathematics is that of the layers and of `bounds.estimate`.
"""

import contextlib

import torch
from torch import nn

from ..layers.activations import MaxMin, sort_pairs, unsort_pairs


@contextlib.contextmanager
def _side_stream(device):
    """On CUDA what follows runs on a stream of its own, as capturing asks for; later work waits."""
    if device.type != "cuda":
        yield
        return
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        yield
    here.wait_stream(aside)


def _graph(work):
    """(replay, results) of a function without arguments as a CUDA graph on the current stream:
    replay() does all its work on the device anew, into the same results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = work()
    return graph.replay, results


WIDEST = 64  # of features: beyond, padding costs more than operations do


class DenseStack:
    """The forward pass and the bounds of S runs of one network, S >= 1.

    net: the network of one run, see `fits`; tensors, in calls: its parameters and buffers by name
    (prefix "net."), of shape (S, ...), or with S = 1 those of the network itself.
    """

    def __init__(self, net, runs, device):
        layers = [(i, layer) for i, layer in enumerate(net.body) if isinstance(layer, nn.Linear)]
        self.layers = [f"net.body.{i}." for i, _ in layers] + ["net.head."]
        self.vectors = [f"net.v{i}" for i, _ in layers]
        self.scale = 1 / min(net.input_std)
        self.mean, self.std = (
            torch.tensor(v, device=device)[:, None] for v in (net.input_mean, net.input_std)
        )
        self.normalises = bool((net.std != 1).any() or (net.mean != 0).any())
        sizes = [tuple(layer.weight.shape) for _, layer in layers]
        m = max(map(max, sizes))
        # (layers, runs, m, m) and (layers, runs, m): zero outside the part of each layer
        self.padded = torch.zeros(len(layers), runs, m, m, device=device)
        self.parts = [a[:, :n, :k] for a, (n, k) in zip(self.padded, sizes, strict=True)]
        self.iterates = torch.zeros(len(layers), runs, m, device=device)
        self.starts = [v[:, :k] for v, (_, k) in zip(self.iterates, sizes, strict=True)]

    @staticmethod
    def fits(net):
        """Whether a network is one for this class: Linear layers, MaxMin between them."""
        layers = [*net.body, net.head]
        linear, between = layers[::2], layers[1::2]
        return (
            all(type(layer) is nn.Linear and layer.bias is not None for layer in linear)
            and all(type(layer) is MaxMin for layer in between)
            and len(layers) % 2 == 1
            and len(layers) > 1
            and max(max(layer.weight.shape) for layer in linear) <= WIDEST
        )

    def logits(self, tensors, images):
        """(S, N, C) of images (S, N, features)."""
        x = images.mT  # (S, features, N)
        if self.normalises:
            x = (x - self.mean) / self.std
        weights = [self._stacked(tensors[name + "weight"], 3) for name in self.layers]
        biases = [self._stacked(tensors[name + "bias"], 2) for name in self.layers]
        # in order: argmax over classes that lie apart takes 18 times as long
        return _Perceptron.apply(x, *weights, *biases).mT.contiguous()

    def rows(self, tensors):
        """The rows of the head, (S, C, features)."""
        return self._stacked(tensors["net.head.weight"], 3)

    def body_lipschitz(self, tensors, iterations):
        """As LipschitzNet.body_lipschitz for each run, (S,)."""
        weights = [self._stacked(tensors[name + "weight"], 3) for name in self.layers[:-1]]
        own = [self._stacked(tensors[name], 2) for name in self.vectors]
        with torch.no_grad():
            for part, weight, start, v in zip(self.parts, weights, self.starts, own, strict=True):
                part.copy_(weight)
                start.copy_(v)
            A, v = self.padded.flatten(0, 1), self.iterates.flatten(0, 1)
            square = torch.bmm(A.mT, A)
            square.diagonal(dim1=1, dim2=2).add_(1e-16)  # see bounds.estimate
            for _ in range(iterations):
                v = torch.bmm(v[:, None], square)[:, 0]  # symmetric: a row, the faster product
                v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
            if iterations:
                self.iterates.copy_(v.view_as(self.iterates))
                for start, v_own in zip(self.starts, own, strict=True):
                    v_own.copy_(start)
        return self.scale * _ProductOfNorms.apply(self.padded, self.iterates, *weights)

    @staticmethod
    def _stacked(t, dimensions):
        return t if t.ndim == dimensions else t[None]


class _Perceptron(torch.autograd.Function):
    """x (S, features, N) through Linear layers with MaxMin between them. Arguments: x, the weights
    (S, out, in), the biases (S, out)."""

    @staticmethod
    def forward(ctx, x, *tensors):
        n = len(tensors) // 2
        inputs, orders = [x], []
        for i, (weight, bias) in enumerate(zip(tensors[:n], tensors[n:], strict=True)):
            x = torch.baddbmm(bias.unsqueeze(2), weight, x)
            if i < n - 1:
                x, in_order = sort_pairs(x)
                inputs.append(x)
                orders.append(in_order)
        ctx.save_for_backward(*inputs, *orders, *tensors[:n])
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        n = (len(ctx.saved_tensors) + 1) // 3
        inputs, orders = ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n - 1]
        weights, biases = list(ctx.saved_tensors[2 * n - 1 :]), [None] * n
        for i in reversed(range(n)):
            biases[i] = gradient.sum(2)
            outer = torch.bmm(gradient, inputs[i].mT)
            if i:
                gradient = unsort_pairs(torch.bmm(weights[i].mT, gradient), orders[i - 1])
            weights[i] = outer
        return None, *weights, *biases


class _ProductOfNorms(torch.autograd.Function):
    """The product over layers, (S,), of ||A v|| of padded matrices A (layers, S, m, m) and unit
    vectors v (layers, S, m). Its gradient in each weight is that of u^T A v with the constant
    u = A v / ||A v||; weights: the parts that A consists of."""

    @staticmethod
    def forward(ctx, A, v, *weights):
        u = (A * v.unsqueeze(2)).sum(3)
        norms = torch.linalg.vector_norm(u, dim=2)
        product = norms.prod(0)
        # d product / d A = product / norm * u / norm * v^T; all zero where A is
        square = (norms * norms).clamp_min(torch.finfo(u.dtype).tiny)
        ctx.save_for_backward(u * (product / square).unsqueeze(2), v)
        ctx.shapes = [weight.shape[1:] for weight in weights]
        return product

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        u, v = ctx.saved_tensors
        outer = (gradient[:, None] * u).unsqueeze(3) * v.unsqueeze(2)
        return None, None, *(g[:, :n, :k] for g, (n, k) in zip(outer, ctx.shapes, strict=True))
