"""Layers that the certificates know and PyTorch lacks, and the heads of the compared systems.

Each says what it bounds and why; `bounds` proves the bound from the numbers at hand, so that none
of it rests on an iteration that has converged or on a matrix that is orthogonal up to rounding.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from .norms import power_of_two, tensor_of


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
        a, b = _pairs(x, "MaxMin").unbind(2)  # (N, C/2, ...) each
        if x.ndim > 2:
            return _SortPairs.apply(x)[0]
        in_order = a >= b
        return torch.cat([torch.where(in_order, a, b), torch.where(in_order, b, a)], 1)


def sort_pairs(x):
    """(MaxMin of x (N, C, ...), 1 where a pair was in order and 0 elsewhere), without a gradient.

    Each result is written once, where it belongs, and 0 and 1 as numbers let `lerp` choose
    exactly: together 3.5 times as fast on a CPU as `where`, `cat` and `stack`.
    """
    a, b = x.unflatten(1, (-1, 2)).unbind(2)  # (N, C/2, ...) each
    y, in_order = torch.empty_like(x), torch.empty_like(a)
    high, low = y.chunk(2, 1)
    torch.maximum(a, b, out=high)
    torch.minimum(a, b, out=low)
    return y, torch.ge(a, b, out=in_order)


def unsort_pairs(y, in_order):
    """The transpose of `sort_pairs` at the input that gave `in_order`: its gradient."""
    high, low = y.chunk(2, 1)
    x = torch.empty_like(y, memory_format=torch.contiguous_format)
    a, b = x.unflatten(1, (-1, 2)).unbind(2)
    torch.lerp(low, high, in_order, out=a)
    torch.lerp(high, low, in_order, out=b)
    return x


class _SortPairs(torch.autograd.Function):
    """`sort_pairs` for autograd and torch.func."""

    forward = staticmethod(sort_pairs)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(outputs[1])

    @staticmethod
    def backward(ctx, gradient, _):
        return _UnsortPairs.apply(gradient, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, x):
        outputs = _SortPairs.apply(_in_front(x, in_dims[0], info).flatten(0, 1))
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in outputs), (0, 0)


class _UnsortPairs(torch.autograd.Function):
    """`unsort_pairs` for autograd and torch.func."""

    forward = staticmethod(unsort_pairs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        (in_order,) = ctx.saved_tensors
        a, b = gradient.unflatten(1, (-1, 2)).unbind(2)
        return torch.cat([torch.lerp(b, a, in_order), torch.lerp(a, b, in_order)], 1), None

    @staticmethod
    def vmap(info, in_dims, y, in_order):
        own = (y, in_dims[0]), (in_order, in_dims[1])
        x = _UnsortPairs.apply(*(_in_front(*t, info).flatten(0, 1) for t in own))
        return x.unflatten(0, (info.batch_size, -1)), 0


def _in_front(x, axis, info):
    """Under vmap over `axis`, None for a tensor that all share: that axis before the others. With
    the next one it is one batch to a layer without weights."""
    return x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)


class ClampedMaxMin(nn.Module):
    """MaxMin whose maxima are cut off at `high` and whose minima at `low`, one learnable threshold
    per output: (N, C, ...) -> (N, C, ...), cat(min(max(a, b), high), max(min(a, b), low)).

    shape: that of one sample, (C, H, W) or (C,). The thresholds .high and .low have shape
    (C/2, ...). 1-Lipschitz whatever they are: cutting off has slope 0 or 1 in each element. An
    element that is cut off in a whole neighbourhood is constant there, which local bounds use
    (Huang et al., "Training certifiably robust neural networks with efficient local Lipschitz
    bounds", NeurIPS 2021).
    """

    def __init__(self, shape, high=1.0, low=-1.0):
        super().__init__()
        half = (shape[0] // 2, *shape[1:])
        self.high = nn.Parameter(torch.full(half, float(high)))
        self.low = nn.Parameter(torch.full(half, float(low)))

    def forward(self, x):
        wanted = (2 * self.high.shape[0], *self.high.shape[1:])
        if tuple(x.shape[1:]) != wanted:  # broadcasting would repeat the input
            raise ValueError(f"ClampedMaxMin({wanted}) got an input of shape {tuple(x.shape)}")
        a, b = _pairs(x, "ClampedMaxMin").unbind(2)  # (N, C/2, ...) each
        high = torch.minimum(torch.maximum(a, b), self.high)
        return torch.cat([high, torch.maximum(torch.minimum(a, b), self.low)], 1)


class Householder(nn.Module):
    """Householder activation of order 1: (N, C, ...) -> (N, C, ...), C/2 learnable angles.

    Channels (i, i + C/2) form a pair (a, b). The line through the origin at half the angle cuts
    their plane in two; points on the side a sin(t/2) > b cos(t/2) are mirrored at the line, the
    others stay. A mirror keeps the line and all lengths, so the layer is continuous and
    1-Lipschitz. At the initial angle pi/2 it is MaxMin with the minima first.

    Singla, Singla, Feizi, "Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100",
    ICLR 2022.
    """

    def __init__(self, channels):
        super().__init__()
        if channels % 2:
            raise ValueError(f"Householder pairs channels and got {channels}: use an even number")
        self.angle = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def forward(self, x):
        if x.shape[1] != 2 * len(self.angle):  # broadcasting would repeat the input
            raise ValueError(
                f"Householder({2 * len(self.angle)}) got an input of shape {tuple(x.shape)}"
            )
        a, b = x.chunk(2, 1)  # (N, C/2, ...) each
        angle = self.angle.view(-1, *[1] * (x.ndim - 2))
        mirrored = a * torch.sin(angle / 2) > b * torch.cos(angle / 2)
        cosine, sine = torch.cos(angle), torch.sin(angle)
        first = torch.where(mirrored, cosine * a + sine * b, a)
        return torch.cat([first, torch.where(mirrored, sine * a - cosine * b, b)], 1)


class PadChannels(nn.Module):
    """Append channels of zeros: (N, c, ...) -> (N, channels, ...). An isometry."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.channels - x.shape[1]))

    def extra_repr(self):
        return str(self.channels)


class GroupSort(nn.Module):
    """Sort groups of adjacent channels, ascending: (N, C, ...) -> (N, C, ...). Everywhere a
    permutation of each group and continuous, hence 1-Lipschitz.

    Anil, Lucas and Grosse, ICML 2019. Raises ValueError where C is no multiple of group_size.
    """

    def __init__(self, group_size=2):
        super().__init__()
        self.group_size = group_size

    def forward(self, x):
        if x.ndim < 2 or x.shape[1] % self.group_size:
            raise ValueError(
                f"GroupSort({self.group_size}) sorts the channels of dimension 1 in groups and got "
                f"shape {tuple(x.shape)}: use a multiple of {self.group_size} channels"
            )
        return x.unflatten(1, (-1, self.group_size)).sort(2).values.flatten(1, 2)

    def extra_repr(self):
        return str(self.group_size)


class Normalising(nn.Module):
    """A module with the numbers that inputs are normalised by: buffers .mean and .std, one value or
    one per channel. They keep the caller's float64 numbers whatever type the module is converted
    to, and both its forward pass and its certificate read them, also after a change in place."""

    def keep(self, mean, std, persistent=False):
        for name, values in (("mean", mean), ("std", std)):
            value = tensor_of(values, name).to("cpu", torch.float64)
            self.register_buffer(name, value.reshape(-1).clone(), persistent)

    def _apply(self, fn, recurse=True):
        kept = self.mean, self.std
        self.mean, self.std = (value.float() for value in kept)  # MPS has no float64
        super()._apply(fn, recurse)
        if self.std.device.type != "mps":
            self.mean, self.std = (value.to(self.std.device) for value in kept)
        return self

    def normalised(self, x):
        """(x - mean) / std, in the type of x (N, C, ...)."""
        shape = (-1, *[1] * (x.ndim - 2))
        mean, std = (value.to(x.dtype).view(shape) for value in (self.mean, self.std))
        return (x - mean) / std


class Normalize(Normalising):
    """(x - mean) / std per channel, as the first layer of a classifier that certifies
    un-normalised images: (N, C, ...) -> (N, C, ...), 1 / min(std)-Lipschitz.

    mean, std: float or one value per channel. Raises ValueError for a std that is not positive and
    for an input with another number of channels: broadcasting would repeat it, sqrt(C) longer.
    """

    def __init__(self, mean, std):
        super().__init__()
        self.keep(mean, std, persistent=True)
        if not (self.std.isfinite().all() and (self.std > 0).all()):
            raise ValueError(f"std must be positive and finite, got {self.std.tolist()}")

    def forward(self, x):
        if not {self.mean.numel(), self.std.numel()} <= {1, x.shape[1]}:
            raise ValueError(
                f"Normalize has {self.mean.numel()} means and {self.std.numel()} stds for an input "
                f"with {x.shape[1]} channels: give one value, or one per channel"
            )
        return self.normalised(x)

    def extra_repr(self):
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


class Residual(nn.Module):
    """y = shortcut(x) + branch(x), (L_shortcut + L_branch)-Lipschitz.

    branch, shortcut: modules with known bounds, nn.Sequential included, whose outputs have one
    shape; shortcut None is the identity. Write skip connections with it, so that the certificate
    sees them. Raises ValueError for outputs of two shapes: broadcasting repeats the smaller one,
    which makes it longer than its bound.
    """

    def __init__(self, branch, shortcut=None):
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x):
        kept, added = self.shortcut(x), self.branch(x)
        if kept.shape != added.shape:
            raise ValueError(
                f"Residual adds outputs of two shapes, {tuple(kept.shape[1:])} of the shortcut and "
                f"{tuple(added.shape[1:])} of the branch: give both one shape"
            )
        return kept + added


class BatchNormalized(nn.Sequential):
    """A Linear or Conv2d and the BatchNorm after it, bounded as the one linear map that they are in
    evaluation mode. `architectures.as_lipschitz_net` makes these pairs."""

    def __init__(self, linear, norm):
        super().__init__(linear, norm)


# --------------------------------------------------------------------- layers that bound themselves
#
# What these compute from their weights alone is `effective()`: the tensors that `forward` applies
# to the input. Training recomputes them at every step; `freeze` fixes them for inference.


def freeze(module):
    """Compute what layers derive from their weights once, for inference with fixed weights.

    For a private copy: the layers of `module` do not notice a later change of weights or dtype.
    """
    with torch.no_grad():
        for layer in module.modules():
            if hasattr(layer, "effective"):
                layer.frozen = layer.effective()
    return module


class SOCConv2d(nn.Module):
    """Skew orthogonal convolution: y = (I + A + A^2/2! + ... + A^T/T!) x + b, A skew-symmetric.

    (N, in, H, W) -> (N, out, H/stride, W/stride). A is a zero-padded convolution whose kernel, over
    c = max(in stride^2, out) channels, is minus its own adjoint; strides are taken by
    space-to-depth, missing input channels are zero, surplus outputs are dropped. exp(A) would be
    orthogonal. The series stops after terms[0] powers in training and terms[1] in evaluation, and
    is non-expansive as long as ||A|| is small enough: `bounds` proves that for the norm at hand.

    The kernel is scaled to 0.7 / s, where s is the smaller norm of its two unfoldings; then
    ||A|| <= 0.7 k (Singla and Feizi, "Fantastic four", ICLR 2021; for a skew kernel their four
    unfoldings have two different norms). 1x1 kernels are scaled to norm 1. In training s is
    estimated by power iteration (`advance`, once per step) and differentiated; in evaluation it is
    the buffer `norm`, which `bounds.settle` sets to a proven bound.

    Singla and Feizi, "Skew orthogonal convolutions", ICML 2021. Raises ValueError for an even
    kernel, whose adjoint does not fit the same padding, and for terms beyond 1 to 64.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, terms=(5, 12)):
        super().__init__()
        _odd(kernel_size, "SOCConv2d")
        if not all(1 <= count <= 64 for count in terms):
            raise ValueError(f"SOCConv2d needs 1 to 64 terms of its series, got {terms}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.terms = kernel_size, stride, tuple(terms)
        c = max(in_channels * stride**2, out_channels)
        self.weight = nn.Parameter(torch.empty(c, c, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=1 / math.sqrt(c * kernel_size**2))
        self.register_buffer("v_square", F.normalize(torch.randn(c * kernel_size), dim=0))
        self.register_buffer("v_flat", F.normalize(torch.randn(c), dim=0))
        self.register_buffer("norm", torch.ones(()))
        self.frozen = None

    def skew_kernel(self):
        """(c, c, k, k), exactly skew: W[o, i, a, b] = -W[i, o, k-1-a, k-1-b]."""
        half = self.weight / 2  # first: the difference of two numbers may overflow
        return half - half.transpose(0, 1).flip(2, 3)

    @staticmethod
    def unfoldings(kernel):
        """The matrices (c k, c k) and (c, c k k) whose norms, times k, bound that of A."""
        c, _, k, _ = kernel.shape
        return kernel.transpose(1, 2).reshape(c * k, c * k), kernel.reshape(c, -1)

    @torch.no_grad()
    def advance(self, iterations):
        """Move the vectors of the norm estimates by steps of power iteration, in place."""
        kernel = self.skew_kernel()
        square, flat = self.unfoldings(kernel / power_of_two(kernel))
        v, w = self.v_square, self.v_flat
        for _ in range(iterations):
            v = _unit(square.mT @ (square @ v), v)
            w = _unit(flat @ (flat.mT @ w), w)
        self.v_square.copy_(v)
        self.v_flat.copy_(w)

    def effective(self):
        """The scaled kernel (c, c, k, k) of A."""
        kernel = self.skew_kernel()
        size = power_of_two(kernel)
        kernel, norm = kernel / size, self.norm / size
        if self.training:
            square, flat = self.unfoldings(kernel)
            norm = torch.linalg.vector_norm(square @ self.v_square)
            norm = torch.minimum(norm, torch.linalg.vector_norm(flat.mT @ self.v_flat))
        scale = 0.7 if self.kernel_size > 1 else 1.0
        return kernel * (scale / norm.clamp_min(torch.finfo(norm.dtype).tiny))

    def forward(self, x):
        kernel = self.effective() if self.frozen is None else self.frozen
        if self.stride > 1:
            x = F.pixel_unshuffle(x, self.stride)
        y = power = F.pad(x, (0, 0, 0, 0, 0, kernel.shape[0] - x.shape[1]))
        for k in range(1, self.terms[0 if self.training else 1] + 1):
            power = F.conv2d(power, kernel, padding=self.kernel_size // 2) / k
            y = y + power
        return y[:, : self.out_channels] + self.bias.view(-1, 1, 1)

    def extra_repr(self):
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, terms={self.terms}"
        )


class _PotentialStep(nn.Module):
    """y = x - 2 W^T D relu(W x + b) with a diagonal D >= 0: the common form of CPL and SLL.

    W is a matrix (inner, features) or a zero-padded convolution kernel (inner, channels, k, k).
    With S = diag(slopes of relu) in [0, 1] the Jacobian is I - 2 V^T S V, V = D^(1/2) W, symmetric
    with eigenvalues in [1 - 2 ||V||^2, 1]: the layer is 1-Lipschitz if ||V|| <= 1, and in any case
    max(1, 2 ||V||^2 - 1)-Lipschitz, which is what `bounds` proves from D as it is.
    """

    def __init__(self, shape, initialise):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0]))
        initialise(self.weight)
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        nn.init.uniform_(self.bias, -bound, bound)
        self.frozen = None

    def forward(self, x):
        D = self.effective() if self.frozen is None else self.frozen
        if self.weight.ndim == 2:
            return x - 2 * (D * F.relu(F.linear(x, self.weight, self.bias))) @ self.weight
        padding = self.weight.shape[-1] // 2
        h = F.relu(F.conv2d(x, self.weight, self.bias, padding=padding))
        return x - 2 * F.conv_transpose2d(D.view(-1, 1, 1) * h, self.weight, padding=padding)

    def extra_repr(self):
        inner, features, *kernel = self.weight.shape
        return f"{features}, inner={inner}" + (f", kernel_size={kernel[0]}" if kernel else "")


class _CPL(_PotentialStep):
    """Convex potential layer: D = 1 / (||W||^2 + 1e-4).

    In training ||W|| is estimated by power iteration on the vector `v` (one sample's shape;
    `advance`, once per step) and differentiated; in evaluation it is the buffer `norm`, which
    `bounds.settle` sets to a proven bound.
    """

    def __init__(self, shape, input_shape):
        super().__init__(shape, lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)))
        v = torch.randn(input_shape)
        self.register_buffer("v", v / v.norm())
        self.register_buffer("norm", torch.ones(()))

    def _apply_weight(self, x, adjoint=False):
        if self.weight.ndim == 2:
            return x @ self.weight if adjoint else F.linear(x, self.weight)
        convolve = F.conv_transpose2d if adjoint else F.conv2d
        return convolve(x[None], self.weight, padding=self.weight.shape[-1] // 2)[0]

    @torch.no_grad()
    def advance(self, iterations):
        """Move v by steps of power iteration, in place."""
        v = self.v
        for _ in range(iterations):
            v = _unit(self._apply_weight(self._apply_weight(v), adjoint=True), v)
        self.v.copy_(v)

    def effective(self):
        """D, (inner,)."""
        norm = torch.linalg.vector_norm(self._apply_weight(self.v)) if self.training else self.norm
        return (1 / (norm**2 + 1e-4)).expand(self.weight.shape[0])


class CPLLinear(_CPL):
    """Dense convex potential layer, (N, features) -> (N, features); see `_PotentialStep`.

    Meunier, Delattre, Araujo, Allauzen, "A dynamical system perspective for Lipschitz neural
    networks", ICML 2022.
    """

    def __init__(self, features, inner):
        super().__init__((inner, features), (features,))


class CPLConv2d(_CPL):
    """Convolutional convex potential layer, (N, channels, H, W) -> same; see `CPLLinear`.

    input_shape: (channels, H, W), the shape on which power iteration works. Odd kernels only.
    """

    def __init__(self, input_shape, inner=5, kernel_size=3):
        _odd(kernel_size, "CPLConv2d")
        super().__init__((inner, input_shape[0], kernel_size, kernel_size), input_shape)


class _SLL(_PotentialStep):
    """SDP-based layer: D = 1 / T, T_i = sum_j |G_ij| q_j / q_i, G = W W^T, q > 0.

    T - G is diagonally dominant after the scaling by q, hence W^T D W <= I. q = exp(.q) is positive
    by construction, and the sum runs over the same axis as q_j.
    """

    def __init__(self, shape):
        super().__init__(shape, nn.init.xavier_normal_)
        self.q = nn.Parameter(torch.randn(shape[0]))

    def effective(self):
        """D, (inner,), 0 for rows of zeros. In full precision also under autocast."""
        with _full_precision(self.weight):
            small = 1e-200 if self.weight.dtype == torch.float64 else 1e-30
            if self.weight.ndim == 2:
                G = (self.weight @ self.weight.mT).abs()
            else:  # correlations of the kernels at all offsets: the rows of G on an endless image
                pad = self.weight.shape[-1] - 1
                G = F.conv2d(self.weight, self.weight, padding=pad).abs().sum((2, 3))
            q = torch.exp(self.q - self.q.max()).clamp_min(small)
            total = G @ q
            return q / torch.where(total > small, total, math.inf)


class SLLLinear(_SLL):
    """Dense SDP-based layer, (N, features) -> (N, features); see `_SLL` and `_PotentialStep`.

    Araujo, Havens, Delattre, Allauzen, Hu, "A unified algebraic perspective on Lipschitz neural
    networks", ICLR 2023, theorem 1.
    """

    def __init__(self, features, inner):
        super().__init__((inner, features))


class SLLConv2d(_SLL):
    """Convolutional SDP-based layer, (N, channels, H, W) -> same; see `SLLLinear`.

    Zero padding cuts a part out of the endless image for which T is made, and a part of an
    operator has no larger norm. Odd kernels only.
    """

    def __init__(self, channels, inner=5, kernel_size=3):
        _odd(kernel_size, "SLLConv2d")
        super().__init__((inner, channels, kernel_size, kernel_size))


class _Sandwich(nn.Module):
    """y = sqrt(2) A^T P relu(sqrt(2) P^-1 B x + b), A A^T + B B^T = I, P = diag(exp(psi)).

    1-Lipschitz: with w = relu(z) - relu(z'), z - z' = B d and slopes in [0, 1], w^T (B d - w) >= 0
    (the diagonal P drops out), so ||2 A^T w||^2 = 4 w^T (I - B B^T) w <= 4 w^T B d - 4 ||B^T w||^2
    = ||d||^2 - ||d - 2 B^T w||^2 <= ||d||^2. [A B] comes from the Cayley transform of a free
    matrix, so that training is unconstrained. If rounding leaves ||[A B]||^2 = 1 + e, the same
    lines give the constant sqrt(1 + 4 e (1 + e)), which `bounds` proves.

    Initialised near A = cos(pi/4) I and B of the same size, where a layer keeps lengths up to what
    relu loses. The published Xavier weights make A small and shrink differences of images to a
    thousandth over the eleven layers of the LBDN network, which then takes epochs to wake up.

    Wang and Manchester, "Direct parameterization of Lipschitz-bounded deep networks", ICML 2023.
    """

    def __init__(self, shape):
        super().__init__()
        out = shape[0]
        self.weight = nn.Parameter(torch.empty(shape))  # (out, out + in, ...)
        nn.init.xavier_normal_(self.weight, gain=0.1)
        with torch.no_grad():  # V^T V = (tan(pi/8))^2 I, at all frequencies: then A and B are alike
            middle = (..., *(k // 2 for k in shape[2:]))
            start = torch.empty(out, shape[1] - out)
            nn.init.orthogonal_(start, gain=math.tan(math.pi / 8))
            self.weight[:, out:][middle] += start
        self.bias = nn.Parameter(torch.empty(out))
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        nn.init.uniform_(self.bias, -bound, bound)
        self.psi = nn.Parameter(torch.zeros(out))
        self.frozen = None

    def _cayley(self, W):
        """[A B], (..., n, n + m), with orthonormal rows, of W (..., n, n + m), real or complex,
        brought to the length alpha."""
        n, W = W.shape[-2], self.alpha * W / _length(W).clamp_min(1e-30)
        U, V = W[..., :n].mH, W[..., n:].mH  # (..., n, n), (..., m, n)
        Z = U - U.mH + V.mH @ V
        identity = torch.eye(n, dtype=W.dtype, device=W.device)
        # (I + Z) has a positive definite symmetric part, so that it is never singular
        return _RightSolve.apply(identity + Z, torch.cat([identity - Z, -2 * V], -2)).mH

    def extra_repr(self):
        out, both = self.weight.shape[:2]
        return f"{both - out}, {out}"


class _RightSolve(torch.autograd.Function):
    """X of X A = B, A (..., n, n), B (..., m, n). On CPUs one matrix at a time, backward as well:
    with several threads torch's LU of a batch never returns from n = 151 on (PyTorch issue 142815).
    """

    @staticmethod
    def forward(A, B):
        if A.device.type == "cpu" and A.ndim > 2 and A.shape[-1] > 128:
            return torch.stack([_RightSolve.forward(*pair) for pair in zip(A, B, strict=True)])
        return torch.linalg.solve(A, B, left=False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, gradient):
        A, X = ctx.saved_tensors
        gradient = _RightSolve.apply(A.mH, gradient)
        return -X.mH @ gradient, gradient

    @staticmethod
    def vmap(info, in_dims, A, B):
        return _RightSolve.apply(_in_front(A, in_dims[0], info), _in_front(B, in_dims[1], info)), 0


class SandwichLinear(_Sandwich):
    """Dense sandwich layer, (N, in) -> (N, out); see `_Sandwich`."""

    def __init__(self, in_features, out_features):
        super().__init__((out_features, out_features + in_features))
        self.alpha = nn.Parameter(_length(self.weight.detach()))

    def effective(self):
        """[A B], (out, out + in)."""
        with _full_precision(self.weight):
            return self._cayley(self.weight / power_of_two(self.weight))

    def forward(self, x):
        both = self.effective() if self.frozen is None else self.frozen
        A, B = both[:, : len(both)], both[:, len(both) :]
        P = torch.exp(self.psi)
        h = F.relu(math.sqrt(2) / P * F.linear(x, B) + self.bias)
        return (math.sqrt(2) * P * h) @ A


class SandwichConv2d(_Sandwich):
    """Convolutional sandwich layer with circular padding, (N, in, H, W) -> (N, out, H/s, W/s).

    A and B are circular convolutions of the whole image: the Cayley transform acts on each
    frequency of the kernel's Fourier transform, after which kernels have no finite support. The
    transform is unitary, so the proof of `_Sandwich` holds as it stands. Strides are taken by
    space-to-depth with half the kernel.

    input_shape: (in, H, W). Raises ValueError for a kernel larger than the image.
    """

    def __init__(self, input_shape, out_channels, kernel_size=3, stride=1):
        channels, *size = input_shape
        k = max(1, kernel_size // stride)
        self.size, self.stride = tuple(n // stride for n in size), stride
        if min(self.size) < k:
            raise ValueError(f"SandwichConv2d: a {k}x{k} kernel is larger than its image {size}")
        super().__init__((out_channels, out_channels + channels * stride**2, k, k))
        self.alpha = nn.Parameter(_length(self._spectrum(self.weight.detach())))

    def _spectrum(self, weight):
        """Fourier transform of the centred kernel, (H, W/2 + 1, out, out + in)."""
        (height, width), k = self.size, weight.shape[-1]
        kernel = F.pad(weight, (0, width - k, 0, height - k))
        kernel = kernel.roll((-(k // 2), -(k // 2)), (2, 3))
        return torch.fft.rfft2(kernel).permute(2, 3, 0, 1)

    def effective(self):
        """[A B] of each frequency, (H, W/2 + 1, out, out + in), complex."""
        with _full_precision(self.weight):
            return self._cayley(self._spectrum(self.weight / power_of_two(self.weight)))

    def forward(self, x):
        both = self.effective() if self.frozen is None else self.frozen
        with _full_precision(self.weight):  # no FFT in half precision
            if self.stride > 1:
                x = F.pixel_unshuffle(x, self.stride)
            if tuple(x.shape[-2:]) != self.size:  # another FFT would crop or repeat the image
                raise ValueError(
                    f"SandwichConv2d for images of {[n * self.stride for n in self.size]} got "
                    f"an input of shape {tuple(x.shape)}"
                )
            out = both.shape[-2]
            A, B = both[..., :out], both[..., out:]
            P = torch.exp(self.psi).view(-1, 1, 1)
            z = self._convolve(B, x.to(self.weight.dtype))
            h = F.relu(math.sqrt(2) / P * z + self.bias.view(-1, 1, 1))
            return self._convolve(A.mH, math.sqrt(2) * P * h)

    def _convolve(self, matrices, x):
        """The circular convolution with these frequency responses (H, W/2 + 1, o, i)."""
        spectrum = torch.fft.rfft2(x).permute(2, 3, 1, 0)  # (H, W/2 + 1, i, N)
        return torch.fft.irfft2((matrices @ spectrum).permute(3, 2, 0, 1), s=self.size)

    def extra_repr(self):
        return (
            super().extra_repr() + f", kernel_size={self.weight.shape[-1]}, stride={self.stride}, "
            f"size={self.size}"
        )


# ---------------------------------------------------------------------------------------- heads


class NormalizedLinear(nn.Linear):
    """Linear head with rows of length 1 (last-layer normalisation, "LLN"): f_i - f_j is then
    bounded by ||w_i - w_j||, which the certificate takes pair by pair. It is no 1-Lipschitz map.

    Singla, Singla, Feizi, ICLR 2022.
    """

    def rows(self):
        """(C, features), each of length 1; rows of zeros stay 0."""
        return F.normalize(self.weight / power_of_two(self.weight, 1), dim=1)

    def forward(self, x):
        return F.linear(x, self.rows(), self.bias)


class Truncation(nn.Module):
    """Head that reads the first out_features coordinates as logits: rows e_i, sqrt(2) apart."""

    def __init__(self, in_features, out_features):
        super().__init__()
        if out_features > in_features:
            raise ValueError(f"Truncation cannot read {out_features} logits off {in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("unit", torch.ones(()), persistent=False)  # knows device and dtype

    def rows(self):
        """(C, features), the first rows of the identity."""
        return torch.eye(
            self.out_features, self.in_features, dtype=self.unit.dtype, device=self.unit.device
        )

    def forward(self, x):
        return x[:, : self.out_features]

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}"


# ---------------------------------------------------------------------------------------- details


def _pairs(x, name):
    """Adjacent channels in pairs: (N, C, ...) -> (N, C/2, 2, ...)."""
    if x.ndim < 2 or x.shape[1] % 2:
        raise ValueError(
            f"{name} pairs the channels of dimension 1 and got shape {tuple(x.shape)}: "
            "use an even number of channels"
        )
    return x.unflatten(1, (-1, 2))


def _length(x):
    """||x||, summed in float64: float32 loses up to 4e-3 of a sum of millions of squares, which put
    the gradients of the full-size Sandwich network off by 3 %."""
    wide = torch.promote_types(x.dtype, torch.float64)
    return torch.linalg.vector_norm(x, dtype=wide).to(x.real.dtype)


def _full_precision(tensor):
    """Autocast off on the tensor's device (the meta device knows no autocast)."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def _odd(kernel_size, name):
    if kernel_size % 2 == 0:
        raise ValueError(f"{name} needs an odd kernel, got {kernel_size}")


def _unit(x, fallback):
    """x / ||x||; where x vanishes, the vector before."""
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm > 0, x / norm.clamp_min(torch.finfo(x.dtype).tiny), fallback)
