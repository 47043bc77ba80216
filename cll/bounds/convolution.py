"""Upper bounds of the norm of a convolution: on the torus, in strips, by block rows."""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dense import lanczos, proven_square
from .linear import CHUNK, TINY, U, axes, gamma, round_up

LARGEST = 3e13  # flops above which no proof is tried but the first


def torus_norm(layer, weight, input_shape, extra=0):
    """Upper bound of the norm of a convolution by the DFT on a torus that contains it.

    Per dimension the layer computes y[i] = sum_a w[a] x[i s + t_a], 0 <= i < m, for offsets
    t_a = d a - (padding before), where x[j] = 0 outside 0 <= j < n.

    Zero padding. Let the input occupy 0..n-1 of Z_N, zero elsewhere, for N a multiple of s with
    N >= m s, N >= n - min(0, lowest position read) and N > highest position read. The circular
    operator z[i] = sum_a w[a] x[(i s + t_a) mod N], 0 <= i < N/s, then agrees with the layer for
    i < m <= N/s: a position below 0 wraps to n or above, a position from n on does not wrap, and
    both meet zeros. So the layer is a part of the circular operator (embedding, operator, selection
    of outputs), and its norm is no larger. Taps and outputs that meet only padding are dropped
    first, which leaves the layer as it is and makes N smaller. Every larger N is valid too: `extra`
    adds that many multiples of s to the smallest one.

    Circular padding is the case N = n if s divides n. In general the outputs stand at multiples of
    g = gcd(s, n), each visited at most r = ceil(m g / n) times, and the norm is at most sqrt(r)
    times that of the circular operator of stride g.

    Write t_a = s q_a + r_a, 0 <= r_a < s, and x_r[j] = x[s j + r] (polyphase components). Then
    z[i] = sum_a w[a] x_{r_a}[i + q_a] on Z_M, M = N/s, and the unitary DFT turns the operator into
    independent blocks, one per frequency f,
        B_f[o, (c, r)] = sum over a with r_a = r of w[o, c, a] exp(2 pi i f q_a / M).
    The norm is the largest norm of a block. Real weights make B_{-f} the conjugate of B_f, so half
    of the frequencies suffice. Groups are independent operators: the largest of their norms counts.

    Rounding: each exp is off by less than 32 u in its real and imaginary part (an exact integer
    phase, reduced to [-pi, pi], then a cosine or sine within 2 ulp), each sum of T products by
    gamma(T), so an entry of a block by sqrt(2) (32 u + gamma(T + 1)) sum_a |w[a]|. The Frobenius
    norm of that is added to the proven norm of the blocks as computed.
    """
    circular, sides = layer.padding_mode == "circular", axes(layer, input_shape)
    split = [_polyphase(axis, circular, extra) for axis in sides]
    if None in split:
        return 0.0
    phases, kernels, mass = _components(weight, layer.groups, *split)
    (rows, *_, M_h), (columns, *_, M_w) = split
    frobenius = mass.square().sum((-2, -1)).max().sqrt().item()
    entry_error = _entry_error(len(rows) * len(columns)) * frobenius
    square = _largest_square(phases, kernels, mass.shape, M_h, M_w)
    repeats = 1
    for axis in sides if circular else ():
        repeats *= -(-axis.m * math.gcd(axis.s, axis.n) // axis.n)
    return round_up(math.sqrt(repeats) * (math.sqrt(square) + entry_error + TINY))


def _components(weight, groups, vertical, horizontal):
    """(phases, kernels, mass) of a kernel: one entry per pair of polyphase components that is read.
    phases: (T, 2), in units of 1 / (M_h M_w); kernels: (T, G * O/G * C/G); mass: the sums of
    |weight|, (G, O/G, C/G * components)."""
    (rows, q_h, r_h, M_h), (columns, q_w, r_w, M_w) = vertical, horizontal
    weight = weight[:, :, rows][:, :, :, columns].unflatten(0, (groups, -1))  # (G, O/G, C/G, k, k)
    phases, kernels, mass = [], [], []
    for r in r_h.unique():
        for t in r_w.unique():
            a, b = (r_h == r).nonzero()[:, 0], (r_w == t).nonzero()[:, 0]
            kernel = weight[..., a, :][..., b].flatten(-2)  # (G, O/G, C/G, T)
            phases.append(torch.cartesian_prod(q_h[a] * M_w, q_w[b] * M_h))  # (T, 2)
            kernels.append(kernel.movedim(-1, 0).flatten(1))  # (T, G * O/G * C/G)
            mass.append(kernel.abs().sum(-1))
    return phases, kernels, torch.cat(mass, -1)


def _largest_square(phases, kernels, shape, M_h, M_w):
    """Upper bound of the squared norms of the blocks of all frequencies, as computed. shape: of the
    mass of `_components`."""
    groups, outputs, inputs = shape
    short, long = sorted((outputs, inputs))
    chunk = max(1, CHUNK // (groups * short * max(4 * short, long)))
    period, square, t = M_h * M_w, 0.0, 0.0
    frequencies = torch.cartesian_prod(torch.arange(M_h), torch.arange(M_w // 2 + 1))
    for f in frequencies.split(chunk):
        real, imag = [], []
        for phase, kernel in zip(phases, kernels, strict=True):
            turns = f @ phase.T % period  # (F, T), exact integers
            turns = torch.where(2 * turns > period, turns - period, turns)
            angle = turns.double() * (2 * math.pi) / period
            block = (-1, outputs, inputs // len(kernels))
            real.append((torch.cos(angle) @ kernel).view(block))
            imag.append((torch.sin(angle) @ kernel).view(block))
        bound, t = proven_square(torch.cat(real, -1), torch.cat(imag, -1), t)
        square = max(square, bound)
    return square


def _axes(layer, input_shape, flip):
    """The axes (along, across) of a proof: rows and columns, or the reverse if `flip`."""
    return axes(layer, input_shape)[:: -1 if flip else 1]


def _polyphase(axis, circular=False, extra=0):
    """(taps that meet the input, their q_a, their r_a, M) of a dimension, see `torus_norm`; None if
    all taps meet padding only."""
    offsets, taps = axis.d * torch.arange(axis.k) - axis.before, torch.arange(axis.k)
    if circular:
        step, size = math.gcd(axis.s, axis.n), axis.n
    else:
        inside = axis.reads() >= 0
        if not inside.any():
            return None
        taps, outputs = inside.any(0).nonzero()[:, 0], inside.any(1).nonzero()[:, 0]
        read = axis.s * torch.arange(outputs[0], outputs[-1] + 1)[:, None] + offsets[taps]
        step, offsets = axis.s, read[0]
        size = max(axis.n - min(0, read.min().item()), read.max().item() + 1, len(read) * step)
        size += extra * step
    return taps, offsets // step, offsets % step, -(-size // step)


def _entry_error(taps):
    """Relative error of a sum of so many taps times phases, see `torus_norm`, and 1 % to spare."""
    return 1.01 * (math.sqrt(2) * (32 * U + gamma(taps + 1)))


def _cost(reads, width, matrices):
    """Flops of a factorisation of so many `Banded` matrices."""
    return matrices * len(reads) * width**3 * (1 + _reach(reads)) ** 2


def cheapest(layer, weight, input_shape):
    """(flops, flip, adjoint) of the cheapest `as_rows` to factorise."""
    plans = []
    for flip, adjoint in itertools.product((False, True), repeat=2):
        along, across = _axes(layer, input_shape, flip)
        width = weight.shape[1] * across.n if adjoint else len(weight) // layer.groups * across.m
        cost = _cost(along.reads(adjoint), width, layer.groups)
        plans.append((float(cost), flip, adjoint))
    return min(plans)


def strip_plans(layer, weight, input_shape):
    """The (flip, half) of `as_strips` that LARGEST allows: first those between the frequencies of
    the first proof, which has found too large a norm there."""
    allowed = []
    for flip in (False, True):
        along, across = _axes(layer, input_shape, flip)
        split = _polyphase(across)
        if split is not None:  # or else all taps meet padding, which the first proof sees
            _, _, r, M = split
            inputs, outputs = weight.shape[1] * len(r.unique()), len(weight) // layer.groups
            reads, width = along.reads(inputs < outputs), 2.0 * min(inputs, outputs)
            if _cost(reads, width, layer.groups * (M // 2 + 1)) <= LARGEST:
                allowed.append(flip)
    return [(flip, half) for half in (True, False) for flip in allowed]


def _reach(reads):
    """How far apart two blocks may be that read a common one."""
    meet = (reads[:, None, :, None] == reads[None, :, None, :]) & (reads >= 0)[:, None, :, None]
    first, second = meet.any(-1).any(-1).nonzero().unbind(1)
    return int((first - second).abs().max()) if len(first) else 0


def _kernel(layer, weight, flip):
    """The weight as (k along, G, O/G, C/G, k across)."""
    kernel = weight.mT if flip else weight
    return kernel.unflatten(0, (layer.groups, -1)).permute(3, 0, 1, 2, 4)


def as_rows(layer, weight, input_shape, flip, adjoint):
    """A zero-padded convolution as it is: a `Banded` matrix of dense blocks, the one-dimensional
    convolutions of an image row (column if `flip`) by each row of the kernel. adjoint: the
    transpose, for smaller blocks."""
    along, across = _axes(layer, input_shape, flip)
    kernel = _kernel(layer, weight, flip)
    taps = weight.new_zeros(*kernel.shape[:3], across.m, kernel.shape[3], across.n)
    for b, reads in enumerate(across.reads().T):
        outputs = (reads >= 0).nonzero()[:, 0]
        taps[:, :, :, outputs, :, reads[outputs]] = kernel[..., b]
    taps = taps.flatten(4).flatten(2, 3)  # (k, G, outputs, inputs)
    return Banded(taps.mT if adjoint else taps, along.reads(adjoint))


def as_strips(layer, weight, input_shape, flip, half):
    """A zero-padded convolution after the DFT along image rows alone (along columns if `flip`),
    where it is embedded as in `torus_norm`; the other direction keeps its border. For each
    frequency there remains a convolution of one dimension, a `Banded` matrix whose blocks are
    complex matrices of channels, in real form.

    half: frequencies (f + 1/2) / M instead of f / M. Phases exp(i a j) on the positions j of inputs
    and outputs change no norm and turn w[b] into w[b] exp(i a q_b), up to a phase per component, so
    that any shift of the grid is as good: where the norm peaks at a frequency of one grid, the
    other passes on both sides of the peak.
    """
    along, across = _axes(layer, input_shape, flip)
    kernel, (columns, q, r, M) = _kernel(layer, weight, flip), _polyphase(across)
    frequencies = 2 * torch.arange((M + 1) // 2 if half else M // 2 + 1) + half
    turns = frequencies[:, None] * q % (2 * M)  # (F, taps), exact integers
    angle = torch.where(turns > M, turns - 2 * M, turns).double() * math.pi / M
    real, imag, mass = [], [], []
    for component in r.unique():
        b = (r == component).nonzero()[:, 0]
        tap = kernel[..., columns[b]]
        real.append(torch.einsum("kgoct,ft->kfgoc", tap, torch.cos(angle[:, b])))
        imag.append(torch.einsum("kgoct,ft->kfgoc", tap, torch.sin(angle[:, b])))
        mass.append(tap.abs().sum(-1))
    real, imag = torch.cat(real, -1), torch.cat(imag, -1)
    taps = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2).flatten(1, 2)
    adjoint = taps.shape[-1] < taps.shape[-2]
    mass = torch.cat(mass, -1).square().sum((-2, -1)).sqrt()  # (k, G)
    error = _entry_error(len(columns)) * mass.sum(0).max().item()
    return Banded(taps.mT if adjoint else taps, along.reads(adjoint), error)


class Banded(NamedTuple):
    """A stack of banded block matrices A with the blocks A[u, reads[u, a]] = taps[a]."""

    taps: Tensor  # (k, stack, p, q)
    reads: Tensor  # (blocks, k), -1 for none
    error: float = 0.0  # by which the norms are off, at most, of matrices that a DFT made

    def search(self, lower, upper):
        """Upper bound of the norm of the layer, which `lower` and `upper` enclose: the first that
        can be proven from `lower` on, or `upper`."""
        if self.error:  # the norm of what the layer is embedded in
            lower = max(lower, self._estimate())
        for i in range(8):  # Lanczos is off by some 1e-7, and a first guess that fails is lost time
            guess = lower * (1 + 1e-6 * 6**i)
            if guess >= upper:
                break
            bound = self.prove(guess)
            if bound is not None:
                return min(bound, upper)
        return upper

    def prove(self, s):
        """A bound of the norms, barely above s, proven by floating-point Cholesky factorisation, or
        None.

        G = A A^T has the blocks G[u, v] = sum of taps[a] taps[b]^T over reads[u, a] = reads[v, b]
        >= 0, which vanish for |u - v| > r. t I - G is factorised row of blocks by row of blocks, as
        in `dense.proven_square`, but with n = (r + 1) p terms at most in an inner product, and at
        most 2 n entries that are not 0 in a row of |R|^T |R|, so that
            ||D|| <= gamma(n + 1) / (1 - gamma(n + 1)) * 2 n t.
        G as computed is off by at most gamma(q + k) |A| |A|^T entry by entry, in norm by
        gamma(q + k) times the largest row sum and column sum of |A|.
        """
        k, _, p, q = self.taps.shape
        n = (_reach(self.reads) + 1) * p
        factor = gamma(n + 2) / (1 - gamma(n + 2)) * 2 * n + 2 * U  # 2 U: the diagonal of t I - G
        sums = [self.taps.abs().sum(axis).amax(-1).sum(0).max().item() for axis in (-2, -1)]
        off = 1.01 * gamma(q + k + 1) * math.prod(sums) + TINY
        for taps in self.taps.split(max(1, CHUNK // p**2), 1):  # what fits into memory
            if not _factorises(taps, self.reads, s * s):
                return None
        bound = round_up(math.sqrt((s * s * (1 + factor) + off) * (1 + 8 * U)))
        return round_up(bound + self.error) if self.error else bound

    def _estimate(self):
        """The largest norm, by Lanczos in float32: a proof at too small a number takes longer."""
        taps, size = self.taps.float(), int(self.reads.max()) + 1
        blocks = [((j >= 0).nonzero()[:, 0], j[j >= 0]) for j in self.reads.T]

        def gram(x):
            x = x.view(taps.shape[1], size, -1)
            y, z = x.new_zeros(len(x), len(self.reads), taps.shape[2]), torch.zeros_like(x)
            for tap, (i, j) in zip(taps, blocks, strict=True):
                y[:, i] += x[:, j] @ tap.mT
            for tap, (i, j) in zip(taps, blocks, strict=True):
                z[:, j] += y[:, i] @ tap
            return z.flatten()

        start = torch.Generator().manual_seed(0)
        v = lanczos(gram, torch.randn(math.prod(taps.shape[1::2]) * size, generator=start), 1e-6)
        return math.sqrt((gram(v).dot(v) / v.dot(v)).item())


def _factorises(taps, reads, t):
    """Whether the factorisation of t I - G of `Banded.prove` runs to completion. Equal blocks of G
    are computed once; those of the factor R that no later row needs are dropped."""

    @functools.cache
    def product(pairs):
        total = taps.new_zeros(taps.shape[1], *[taps.shape[2]] * 2)
        return sum((taps[a] @ taps[b].mT for a, b in pairs), total)

    def gram(u, v):
        meet = (reads[u][:, None] == reads[v]) & (reads[u] >= 0)[:, None]
        return product(tuple(map(tuple, meet.nonzero().tolist())))

    reach, R = _reach(reads), {}
    for u in range(len(reads)):
        above = range(max(0, u - reach), u)
        S = -gram(u, u)
        S.diagonal(dim1=-2, dim2=-1).add_(t)
        for w in above:
            S -= R[w, u].mT @ R[w, u]
        L, info = torch.linalg.cholesky_ex(S)
        if info.any() or not L.diagonal(dim1=-2, dim2=-1).isfinite().all():
            return False
        for v in range(u + 1, min(u + reach + 1, len(reads))):
            B = -gram(u, v)
            for w in above:
                if (w, v) in R:
                    B -= R[w, u].mT @ R[w, v]
            R[u, v] = torch.linalg.solve_triangular(L, B, upper=False)
        R = {(w, v): block for (w, v), block in R.items() if w > u - reach}
    return True
