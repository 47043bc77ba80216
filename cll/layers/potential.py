"""Convex potential layers, CPL and SLL: the layers, their bound, their rounding."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from ..bounds.layer import absolute_norm, check_shape, power_step, without_weight
from ..bounds.linear import SAFE, TINY, U, as_text, gamma, lengths, round_up
from ..bounds.norm import first_bound, matrix_norm
from ..bounds.registry import register_ours, register_plain, register_rounding
from ..bounds.trace import evaluation_copy
from .structure import Sum, plain_layer, without_autocast


class _PotentialStep(nn.Module):
    """y = x - 2 W^T D relu(W x + b) with a diagonal D >= 0: the common form of CPL and SLL.

    W is a matrix (inner, features) or a zero-padded convolution kernel (inner, channels, k, k).
    With S = diag(slopes of relu) in [0, 1] the Jacobian is I - 2 V^T S V, V = D^(1/2) W, symmetric
    with eigenvalues in [1 - 2 ||V||^2, 1]: the layer is 1-Lipschitz if ||V|| <= 1, and in any case
    max(1, 2 ||V||^2 - 1)-Lipschitz.
    """

    def __init__(self, shape, initialise):
        super().__init__()
        if len(shape) > 2 and shape[-1] % 2 == 0:
            raise ValueError(f"{type(self).__name__} needs an odd kernel, got {shape[-1]}")
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0]))
        initialise(self.weight)
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        nn.init.uniform_(self.bias, -bound, bound)
        self.frozen = None

    # the constructors' arguments, which a certificate names
    inner = property(lambda layer: layer.weight.shape[0])
    features = channels = property(lambda layer: layer.weight.shape[1])
    kernel_size = property(lambda layer: layer.weight.shape[-1])

    def _apply_weight(self, x, bias=None):
        """W x + b; x is one sample or a batch."""
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, bias)
        return F.conv2d(x, self.weight, bias, padding=self.kernel_size // 2)

    def _apply_adjoint(self, h):
        """W^T h"""
        if self.weight.ndim == 2:
            return h @ self.weight
        return F.conv_transpose2d(h, self.weight, padding=self.kernel_size // 2)

    def forward(self, x):
        D = self.effective() if self.frozen is None else self.frozen
        h = F.relu(self._apply_weight(x, self.bias))
        return x - 2 * self._apply_adjoint(D.view(-1, *[1] * (self.weight.ndim - 2)) * h)

    def extra_repr(self):
        kernel = f", kernel_size={self.kernel_size}" if self.weight.ndim > 2 else ""
        return f"{self.features}, inner={self.inner}{kernel}"


class _CPL(_PotentialStep):
    """Convex potential layer: D = 1 / (||W||^2 + 1e-4).

    In training ||W|| is estimated by power iteration on the vector `v` (one sample's shape;
    `advance`, once per step) and differentiated; in evaluation it is the buffer `norm`, which
    `settle` sets to a proven bound.

    Meunier, Delattre, Araujo, Allauzen, "A dynamical system perspective for Lipschitz neural
    networks", ICML 2022.
    """

    def __init__(self, shape, input_shape):
        super().__init__(shape, lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)))
        v = torch.randn(input_shape)
        self.register_buffer("v", v / v.norm())
        self.register_buffer("norm", torch.ones(()))

    @torch.no_grad()
    def advance(self, iterations):
        """Move v by steps of power iteration, in place."""
        v = self.v
        for _ in range(iterations):
            v = power_step(self._apply_adjoint(self._apply_weight(v)), v)
        self.v.copy_(v)

    def effective(self):
        """D, (inner,)."""
        norm = torch.linalg.vector_norm(self._apply_weight(self.v)) if self.training else self.norm
        return (1 / (norm**2 + 1e-4)).expand(self.weight.shape[0])


class CPLLinear(_CPL):
    """Dense convex potential layer, (N, features) -> (N, features)."""

    def __init__(self, features, inner):
        super().__init__((inner, features), (features,))


class CPLConv2d(_CPL):
    """Convolutional convex potential layer, (N, channels, H, W) -> same. input_shape: (channels, H,
    W), the shape on which power iteration works. Odd kernels only."""

    input_shape = property(lambda layer: list(layer.v.shape))

    def __init__(self, input_shape, inner=5, kernel_size=3):
        super().__init__((inner, input_shape[0], kernel_size, kernel_size), input_shape)


class _SLL(_PotentialStep):
    """SDP-based layer: D = 1 / T, T_i = sum_j |G_ij| q_j / q_i, G = W W^T, q = exp(.q) > 0.

    T - G is diagonally dominant after the scaling by q, hence W^T D W <= I. A convolution's T is
    made for an endless image: zero padding cuts a part out of it, of no larger norm.

    Araujo, Havens, Delattre, Allauzen, Hu, "A unified algebraic perspective on Lipschitz neural
    networks", ICLR 2023, theorem 1.
    """

    def __init__(self, shape):
        super().__init__(shape, nn.init.xavier_normal_)
        self.q = nn.Parameter(torch.randn(shape[0]))

    def effective(self):
        """D, (inner,), 0 for rows of zeros. In full precision also under autocast."""
        with without_autocast(self.weight):
            small = 1e-200 if self.weight.dtype == torch.float64 else 1e-30
            if self.weight.ndim == 2:
                G = (self.weight @ self.weight.mT).abs()
            else:  # correlations of the kernels at all offsets: the rows of G on an endless image
                G = F.conv2d(self.weight, self.weight, padding=self.kernel_size - 1)
                G = G.abs().sum((2, 3))
            q = torch.exp(self.q - self.q.max()).clamp_min(small)
            total = G @ q
            return q / torch.where(total > small, total, math.inf)


class SLLLinear(_SLL):
    """Dense SDP-based layer, (N, features) -> (N, features)."""

    def __init__(self, features, inner):
        super().__init__((inner, features))


class SLLConv2d(_SLL):
    """Convolutional SDP-based layer, (N, channels, H, W) -> same. Odd kernels only."""

    def __init__(self, channels, inner=5, kernel_size=3):
        super().__init__((inner, channels, kernel_size, kernel_size))


def _lipschitz_constant(layer, input_shape, method):
    """max(1, 2 ||D^(1/2) W||^2 - 1) for the D that the layer applies in evaluation mode: whatever
    norm or q it was made from, the bound holds."""
    if method == "power":
        return 1.0
    layer = evaluation_copy(layer)
    D, W = layer.effective(), layer.weight
    largest = W.abs().flatten(1).amax(1)
    if not ((largest == 0) | (largest < 1e140) & (D > 1e-290)).all():
        raise ValueError(
            f"float64 does not hold the squares that {as_text(layer)} makes of its weight or norm:"
            " no bound; scale them, rows of the weight to entries between 1e-90 and 1e140, or to 0"
        )
    scaled, like = D.sqrt().view(-1, *[1] * (W.ndim - 1)) * W, without_weight(W)
    check_shape(like, input_shape)
    if method == "exact":
        norm = matrix_norm(like, scaled, input_shape, method)
        return max(1.0, 2 * norm * norm - 1)
    norm = first_bound(like, scaled, input_shape)
    # rounding of the entries of D^(1/2) W: 2 u each, in norm at most the sum over taps of Frobenius
    norm *= 1 + 2.1 * U * (math.prod(W.shape[2:]) * math.sqrt(min(W.shape[:2])) + 1)
    return round_up(max(1.0, round_up(2 * norm * norm) - 1))


def _settle(layer, input_shape):
    """The norm that `_CPL.effective` divides by."""
    W = evaluation_copy(layer).weight
    return first_bound(without_weight(W), W, input_shape), 0.0


register_ours(CPLLinear | CPLConv2d, _lipschitz_constant, settle=_settle)
register_ours(SLLLinear | SLLConv2d, _lipschitz_constant)


@register_rounding(CPLLinear | CPLConv2d | SLLLinear | SLLConv2d)
def _potential_rounding(layer, input_shape):
    """z - 2 W^T D relu(W z + b), with m >= || |W| || twice."""
    W, D = layer.weight.detach(), layer.effective().detach()
    m, d = absolute_norm(layer, W, input_shape), D.max().item()
    g = gamma(max(W[0].numel(), W.numel() // W.shape[1]) + 8)
    positions = math.sqrt(math.prod(input_shape[1:])) if W.ndim > 2 else 1.0
    bias = lengths(layer.bias.detach()[None]).item() * positions + TINY
    # relu(W z + b): size s = m ||z|| + bias, error g s; then D, W^T, - and the error through them
    return 6 * g * m * d * m * SAFE + 2 * U, 6 * g * m * d * bias * SAFE + m * TINY


@register_plain(CPLLinear | CPLConv2d | SLLLinear | SLLConv2d)
def _plain(layer, input_shape):
    """x + branch(x), the branch being W with b, relu, and W^T with the factor -2 D."""
    W = layer.weight
    back = -2 * layer.effective().view(-1, *[1] * (W.ndim - 1)) * W
    if W.ndim == 2:
        return Sum(nn.Sequential(plain_layer(W, layer.bias), nn.ReLU(), plain_layer(back.mT)))
    padding = layer.kernel_size // 2
    transposed = skip_init(nn.ConvTranspose2d, *back.shape[:3], padding=padding, bias=False)
    transposed.weight = nn.Parameter(back)
    there = plain_layer(W, layer.bias, padding=padding)
    return Sum(nn.Sequential(there, nn.ReLU(), transposed))
