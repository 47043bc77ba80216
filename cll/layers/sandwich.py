"""Sandwich layers: the layers, their bound, their rounding."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..bounds.dense import proven_square
from ..bounds.linear import CHUNK, SAFE, TINY, U, as_text, gamma, lengths, power_of_two, round_up
from ..bounds.registry import register_ours, register_plain, register_rounding
from ..bounds.trace import evaluation_copy
from .structure import length_of, plain_layer, without_autocast


class _Sandwich(nn.Module):
    """y = sqrt(2) A^T P relu(sqrt(2) P^-1 B x + b), A A^T + B B^T = I, P = diag(exp(psi)).

    1-Lipschitz: with w = relu(z) - relu(z'), z - z' = B d and slopes in [0, 1], w^T (B d - w) >= 0
    (the diagonal P drops out), so ||2 A^T w||^2 = 4 w^T (I - B B^T) w <= 4 w^T B d - 4 ||B^T w||^2
    = ||d||^2 - ||d - 2 B^T w||^2 <= ||d||^2. [A B] comes from the Cayley transform of a free
    matrix, so that training is unconstrained. If rounding leaves ||[A B]||^2 = 1 + e, the same
    lines give the constant sqrt(1 + 4 e (1 + e)).

    Initialised near A = cos(pi/4) I and B of the same size, where a layer keeps lengths up to what
    relu loses. The published Xavier weights shrink differences of images to a thousandth over the
    eleven layers of the LBDN network, which then takes epochs to wake up.

    Wang and Manchester, "Direct parameterization of Lipschitz-bounded deep networks", ICML 2023.
    """

    def __init__(self, out, inputs, kernel=()):
        super().__init__()
        shape = (out, out + inputs, *kernel)
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.xavier_normal_(self.weight, gain=0.1)
        with torch.no_grad():  # V^T V = (tan(pi/8))^2 I, at all frequencies: then A and B are alike
            middle = (..., *(k // 2 for k in kernel))
            start = torch.empty(out, inputs)
            nn.init.orthogonal_(start, gain=math.tan(math.pi / 8))
            self.weight[:, out:][middle] += start
        self.bias = nn.Parameter(torch.empty(out))
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        nn.init.uniform_(self.bias, -bound, bound)
        self.psi = nn.Parameter(torch.zeros(out))
        self.alpha = nn.Parameter(length_of(self._spectrum(self.weight.detach())))
        self.frozen = None

    def effective(self):
        """[A B], (out, out + in); of a convolution at each frequency, (H, W/2 + 1, out, out + in),
        complex."""
        with without_autocast(self.weight):
            return self._cayley(self._spectrum(self.weight / power_of_two(self.weight)))

    def forward(self, x):
        both = self.effective() if self.frozen is None else self.frozen
        out, vector = both.shape[-2], (-1, *[1] * (self.weight.ndim - 2))
        P, bias = torch.exp(self.psi).view(vector), self.bias.view(vector)
        h = F.relu(math.sqrt(2) / P * self._apply_matrix(both[..., out:], x) + bias)
        return self._apply_matrix(both[..., :out].mH, math.sqrt(2) * P * h)

    def _cayley(self, W):
        """[A B], (..., n, n + m), with orthonormal rows, of W (..., n, n + m), real or complex,
        brought to the length alpha."""
        n, W = W.shape[-2], self.alpha * W / length_of(W).clamp_min(1e-30)
        U, V = W[..., :n].mH, W[..., n:].mH  # (..., n, n), (..., m, n)
        Z = U - U.mH + V.mH @ V
        identity = torch.eye(n, dtype=W.dtype, device=W.device)
        # (I + Z) has a positive definite symmetric part, so that it is never singular
        return _RightSolve.apply(identity + Z, torch.cat([identity - Z, -2 * V], -2)).mH


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
        A, B = (
            x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip((A, B), in_dims, strict=True)
        )
        return _RightSolve.apply(A, B), 0


class SandwichLinear(_Sandwich):
    """Dense sandwich layer, (N, in) -> (N, out); see `_Sandwich`."""

    def __init__(self, in_features, out_features):
        super().__init__(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features

    def _spectrum(self, weight):
        return weight

    def _apply_matrix(self, matrix, x):
        return F.linear(x, matrix)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}"


class SandwichConv2d(_Sandwich):
    """Convolutional sandwich layer with circular padding, (N, in, H, W) -> (N, out, H/s, W/s).

    A and B are circular convolutions of the whole image: the Cayley transform acts on each
    frequency of the kernel's Fourier transform, which is unitary: the proof of `_Sandwich` holds as
    it stands. Strides are taken by space-to-depth with half the kernel. input_shape: (in, H, W).
    Raises ValueError for a kernel larger than the image.
    """

    def __init__(self, input_shape, out_channels, kernel_size=3, stride=1):
        channels, *size = input_shape
        k = max(1, kernel_size // stride)
        self.size = tuple(n // stride for n in size)
        if min(self.size) < k:
            raise ValueError(f"SandwichConv2d: a {k}x{k} kernel is larger than its image {size}")
        # the arguments as they take effect, which a certificate names
        self.input_shape = [channels, *(n * stride for n in self.size)]
        self.out_channels, self.kernel_size, self.stride = out_channels, k * stride, stride
        super().__init__(out_channels, channels * stride**2, (k, k))

    def _spectrum(self, weight):
        """Fourier transform of the centred kernel, (H, W/2 + 1, out, out + in)."""
        (height, width), k = self.size, weight.shape[-1]
        kernel = F.pad(weight, (0, width - k, 0, height - k))
        kernel = kernel.roll((-(k // 2), -(k // 2)), (2, 3))
        return torch.fft.rfft2(kernel).permute(2, 3, 0, 1)

    def _apply_matrix(self, matrices, x):
        """The circular convolution with these frequency responses (H, W/2 + 1, o, i)."""
        spectrum = torch.fft.rfft2(x).permute(2, 3, 1, 0)  # (H, W/2 + 1, i, N)
        return torch.fft.irfft2((matrices @ spectrum).permute(3, 2, 0, 1), s=self.size)

    def forward(self, x):
        with without_autocast(self.weight):  # no FFT in half precision
            if self.stride > 1:
                x = F.pixel_unshuffle(x, self.stride)
            if tuple(x.shape[-2:]) != self.size:  # another FFT would crop or repeat the image
                raise ValueError(
                    f"SandwichConv2d for images of {self.input_shape[1:]} got an input of shape "
                    f"{tuple(x.shape)}"
                )
            return super().forward(x.to(self.weight.dtype))

    def extra_repr(self):
        out, both, k, _ = self.weight.shape
        return f"{both - out}, {out}, kernel_size={k}, stride={self.stride}, size={self.size}"


def _lipschitz_constant(layer, input_shape, method):
    """sqrt(1 + 4 e (1 + e)) with e = ||[A B]||^2 - 1, see `_Sandwich`: for the convolution the
    largest norm over the frequencies. irfft2 drops what breaks the symmetry of a real image's
    spectrum, i.e. it averages two responses of that norm."""
    if method == "power":
        return 1.0
    layer = evaluation_copy(layer)
    both, P = layer.effective(), torch.exp(layer.psi)
    if not (both.isfinite().all() and ((P > 1e-300) & (P < 1e300)).all()):
        raise ValueError(
            f"float64 does not hold alpha^2 or exp(psi) of {as_text(layer)}: no bound; take alpha "
            "up to 1e150 and psi from -690 to 690"
        )
    both = both.reshape(-1, *both.shape[-2:])
    if method == "exact":
        square = torch.linalg.matrix_norm(both, 2).max().item() ** 2
    elif both.is_complex():
        square = 0.0
        for part in both.split(max(1, CHUNK // (8 * both.shape[1] ** 2))):
            square = max(square, proven_square(part.real, part.imag)[0])
    else:
        square = proven_square(both)[0]
    excess = max(0.0, square - 1)
    return round_up(math.sqrt(1 + round_up(4 * excess * (1 + excess))))


register_ours(SandwichLinear | SandwichConv2d, _lipschitz_constant)


@register_rounding(SandwichLinear | SandwichConv2d)
def _sandwich_rounding(layer, input_shape):
    """sqrt(2) A^T P relu(sqrt(2) / P B z + b), as products with m >= || |A| ||, || |B| ||; of the
    convolution as products per frequency between two FFTs each."""
    both, out = layer.effective().detach(), len(layer.bias)
    A, B = both[..., :out].abs(), both[..., out:].abs()
    m_A, m_B = (
        math.sqrt((M.sum(-1).amax() * M.sum(-2).amax()).item()) * SAFE * 2 for M in (A, B)
    )  # * 2: real and imaginary parts
    P = torch.exp(layer.psi.detach())
    high, low = P.max().item() * 1.001, P.min().item() / 1.001
    g = gamma(2 * sum(both.shape[-2:]) + 32)
    positions = 1
    if isinstance(layer, SandwichConv2d):
        positions = math.prod(layer.size)
        g = g + 64 * U * math.log2(positions + 1)
    bias = lengths(layer.bias.detach()[None]).item() * math.sqrt(positions) + TINY
    # after relu: size s = sqrt 2 / low m_B ||z|| + bias, error 2 g s; then P, A^T
    factor = math.sqrt(2) * high * m_A * 4 * g * SAFE
    return factor * math.sqrt(2) / low * m_B, factor * bias


@register_plain(SandwichLinear)
def _plain_linear(layer, input_shape):
    """sqrt(2) P^-1 B with b, relu, sqrt(2) A^T P."""
    A, B, P = _factors(layer)
    return nn.Sequential(plain_layer(B / P[:, None], layer.bias), nn.ReLU(), plain_layer(A.mT * P))


@register_plain(SandwichConv2d)
def _plain_convolution(layer, input_shape):
    """As of SandwichLinear, A^T and B as circular convolutions whose kernels are as large as the
    image: the Cayley transform of a small kernel reaches everywhere."""
    A, B, P = _factors(layer)
    steps = [nn.PixelUnshuffle(layer.stride)] if layer.stride > 1 else []
    for matrices, bias in ((B / P[:, None], layer.bias), (A.mH * P, None)):
        kernel = _kernel(matrices, layer.size)
        steps.append(plain_layer(kernel, bias, padding="same", padding_mode="circular"))
        steps += [nn.ReLU()] if bias is not None else []
    return nn.Sequential(*steps)


def _factors(layer):
    """(sqrt(2) A, sqrt(2) B, P), P (out,)."""
    both, out = layer.effective() * math.sqrt(2), len(layer.bias)
    return both[..., :out], both[..., out:], torch.exp(layer.psi)


def _kernel(matrices, size):
    """The kernel (o, i, H, W) of a circular nn.Conv2d with padding "same" that has the frequency
    responses (H, W/2 + 1, o, i). The convolution of y_n = sum_m r_m x_{n - m}; nn.Conv2d puts
    w_j at x_{n + j - before} with (n - 1) // 2 values before the image."""
    response = torch.fft.irfft2(matrices.permute(2, 3, 0, 1), s=size)
    rows, columns = (((n - 1) // 2 - torch.arange(n)) % n for n in size)
    return response[:, :, rows][..., columns].contiguous()
