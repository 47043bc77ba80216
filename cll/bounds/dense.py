"""The norm of a dense matrix: Lanczos from below, Cholesky factorisation from above."""

import math

import torch
from torch import nn

from . import linear
from .linear import TINY, U, gamma, round_down, round_up


def exact_norm(apply, input_shape, outputs, name):
    """Largest singular value of a linear map of batches (N, *input_shape) -> (N, ...) with so many
    outputs, decomposed as a dense matrix. Raises ValueError, with the name, for a large one."""
    entries, limit = math.prod(input_shape) * outputs, linear.DENSE_ENTRIES
    if entries > limit:
        raise ValueError(
            f'method "exact" would decompose {entries:.1e} matrix entries for {name} on '
            f'{input_shape}, limit {limit:.0e}: use "guaranteed" or "power"'
        )
    return torch.linalg.svdvals(linear.dense_matrix(apply, input_shape))[0].item()


@torch.autocast("cpu", enabled=False)  # which would round the search below float32
def lower_bound(layer, weight, input_shape, start=None):
    """Lower bound of the norm: the top singular vector by Lanczos on A^T A, then ||A v|| / ||v|| in
    float64 minus its own rounding error, so that any v gives a lower bound. (Convolutions on 32x32
    have relative gaps near 1e-3 at the top: power iteration would need thousands of steps.) Large
    layers search v in float32, twice as fast: an error d in v costs d^2 in the value, about 1e-6.
    """
    if isinstance(layer, nn.Linear):  # every leading index sees the same matrix
        input_shape = input_shape[-1:]
    size = math.prod(input_shape)
    if start is None:
        v = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    else:
        v = torch.as_tensor(start).detach().to("cpu", torch.float64).reshape(-1)
        if len(v) != size or not v.isfinite().all() or not v.any():
            raise ValueError(f"start must be a finite non-zero vector of shape {input_shape}")
        v = v / v.abs().max()
    small = size <= 2048
    searched = weight if small else weight.to(torch.float32)
    if weight.ndim == 4:
        searched = searched.contiguous(memory_format=torch.channels_last)

    def shaped(v):  # vectors hold the channels last: faster for one image, from 16 channels on
        return v.view(*input_shape[1:], -1).movedim(-1, 0)

    def flat(x):
        return x.movedim(0, -1).reshape(-1)

    def gram(v):
        y = linear.apply_linear(layer, searched, shaped(v)[None])
        return flat(linear.apply_adjoint(layer, searched, y, input_shape)[0])

    v = flat(v.view(input_shape)).to(searched.dtype)
    x = shaped(lanczos(gram, v, 1e-11 if small else 1e-7).to(torch.float64))
    y = linear.apply_linear(layer, weight, x)
    absolute = linear.apply_linear(layer, weight.abs(), x.abs())
    error = gamma(weight[0].numel() + 2) * absolute.norm().item()
    reached = y.norm().item() * (1 - gamma(y.numel() + 2)) - error * 1.01
    return max(0.0, round_down(reached / (x.norm().item() * (1 + gamma(size + 2)))))


def lanczos(gram, v, tolerance, steps=1000):
    """Approximate top eigenvector of a symmetric positive semidefinite map of vectors, from the
    start vector v, until its Rayleigh quotient is estimated to be within `tolerance` of the top.

    Without reorthogonalisation: what it would prevent, copies of values that have converged, does
    no harm to the first one. A basis of 256 MB or more is replaced by the vector found so far."""
    from scipy.linalg import eigh_tridiagonal  # slow to import, and asked for here alone

    longest = max(8, min(steps, 2**28 // (len(v) * v.element_size())))
    for _ in range(0, steps, longest):
        v = v / v.norm()
        basis, diagonal, beside = [v], [], []
        while True:
            w = gram(v)
            if beside:
                w = w.sub(basis[-2], alpha=beside[-1])
            diagonal.append(torch.dot(w, v).item())
            w = w.sub(v, alpha=diagonal[-1])
            beside.append(w.norm().item())
            k, last = len(diagonal), len(diagonal) == longest or not beside[-1]
            if k % 8 == 0 or last:
                last_two = max(0, k - 2), k - 1
                values, vectors = eigh_tridiagonal(diagonal, beside[:-1], False, "i", last_two)
                top, residual = values[-1], beside[-1] * abs(vectors[-1, -1])
                gap = max(top - (values[0] if k > 1 else 0.0), TINY)
                converged = residual * min(1.0, residual / gap) <= tolerance * top
                if converged or last:
                    break
            v = w / beside[-1]
            basis.append(v)
        vector = torch.stack(basis).T @ torch.from_numpy(vectors[:, -1]).to(v.dtype)
        if converged or not beside[-1]:
            break
        v = vector
    return vector


def proven_norm(matrices):
    return round_up(math.sqrt(proven_square(matrices)[0]))


def proven_square(real, imag=None, t=0.0):
    """Upper bound of the squared norm of every matrix B = real + i imag of a stack (..., p, q), the
    entries taken as exact, proven by floating-point Cholesky factorisation. Returns (bound, t); a
    later stack of the same operator may start from t, which saves estimating it again.

    Let n = min(p, q) and G = B^H B (or B B^H), for complex B in its real form [[P, -Q], [Q, P]] of
    twice the size. Computed in float64, G is off by at most gamma(2p + 2) ||B||_F^2 in norm (twice
    that in real form). For an estimate t of its largest eigenvalue, factorise t I - G. If that runs
    to completion, the factor R satisfies R^T R = t I - G + D, |D| <= gamma(n + 1) |R|^T |R|, and
    since the columns of R have squared lengths at most t / (1 - gamma(n + 1)),
        ||D|| <= gamma(n + 1) / (1 - gamma(n + 1)) * n t,
    hence G <= t I + D, however good the estimate (Rump, "Verification of positive definiteness",
    BIT 2006; Higham, theorem 10.3, for any order of summation). One more rounding per product is
    allowed for libraries that multiply by reciprocals of the diagonal. If it breaks down, t is
    raised by the eigenvalues of blocks that failed, and these are tried again; in the end the
    Frobenius norm is the answer.
    """
    parts = [part.reshape(-1, *real.shape[-2:]) for part in (real, imag) if part is not None]
    if real.shape[-2] < real.shape[-1]:
        parts = [part.mT for part in parts]
    p, n = parts[0].shape[-2:]
    stacked = parts[0] if imag is None else torch.cat(parts, -2)
    frobenius = stacked.square().sum((-2, -1)).max().item() * (1 + gamma(2 * p * n + 2))
    gram = stacked.mT @ stacked
    if imag is not None:
        cross = parts[0].mT @ parts[1]
        cross = cross - cross.mT
        gram = torch.cat([torch.cat([gram, -cross], -1), torch.cat([cross, gram], -1)], -2)
        n *= 2
    factor = gamma(n + 2) / (1 - gamma(n + 2)) * n + 2 * U  # 2 U: the diagonal of t I - G
    error = gamma(2 * p + 2) * frobenius * (1 if imag is None else 2) + TINY

    identity, known = torch.eye(n, dtype=torch.float64), t > TINY
    pending = torch.linalg.matrix_norm(gram).argsort(descending=True)
    margin = 4 * (n + 8) * U  # what Cholesky in floating point needs above the largest eigenvalue
    t = max(t, TINY)
    for _ in range(60):
        if not known:
            top = _largest_eigenvalue(gram[pending[:4]])
            raised = max(t, top * (1 + margin))
            if raised == t:
                margin *= 2
                raised = t * (1 + margin)
            t = raised
        known = False
        factors, info = torch.linalg.cholesky_ex(t * identity - gram[pending])
        failed = (info != 0) | ~factors.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        pending = pending[failed]
        if not len(pending):
            return min((t * (1 + factor) + error) * (1 + 8 * U), frobenius + TINY), t
    return frobenius + TINY, t


def _largest_eigenvalue(grams):
    """Estimate, of a few symmetric matrices; large ones by Lanczos, n^2 instead of n^3 a step."""
    if grams.shape[-1] <= 1024:
        return torch.linalg.eigvalsh(grams).max().item()
    v = torch.randn(grams.shape[-1], generator=torch.Generator().manual_seed(0), dtype=grams.dtype)
    tops = [lanczos(gram.mv, v, 1e-14) for gram in grams]
    return max((gram.mv(v).dot(v) / v.dot(v)).item() for gram, v in zip(grams, tops, strict=True))
