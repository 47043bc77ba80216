"""Losses: closed forms, exact gradients, invariances and the numbers that the paper prints."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from cll.losses import (
    OFFSETS,
    aol_as_cll,
    aol_loss,
    binary_cll_loss,
    certificate_regularized_loss,
    cll_loss,
    cll_scale,
    gloro_loss,
    hinge_loss,
    lipschitz_penalty,
    local_bcp_loss,
    polynomial_schedule,
)

# (epsilon, p, printed K^(h o f)), one per row of tables 1 and 2 whose configuration is published,
# then two rows whose epsilon and p are inferred, then the four two-moons panels of the poster
PUBLISHED = [
    (0.5, 0.01, "10.6"),  # Tiny-ImageNet 8C2F
    (0.15, 0.3, "11.6"),  # Tiny-ImageNet LipConv-20
    (1.0, 0.025, "4.4"),  # Tiny-ImageNet 8C2F
    (0.15, 0.3, "11.6"),  # CIFAR-10 6C2F and 4C3F
    (0.25, 0.05, "14.7"),  # CIFAR-10 LipConv-20
    (0.25, 0.1, "11.8"),  # CIFAR-10 CPL-XL
    (1.0, 0.001, "7.6"),  # CIFAR-100 CPL-XL
    (1.0, 0.003, "6.5"),  # CIFAR-100 SLL-XL
    (0.5, 0.01, "10.6"),  # CIFAR-10 SLL-XL, inferred
    (0.5, 0.02, "9.2"),  # CIFAR-100 LipConv-20, inferred
    (0.15, 0.75, "3.4"),
    (0.15, 0.25, "13.0"),
    (0.15, 0.01, "35.3"),
    (0.15, 1e-4, "66.0"),
]


def batch(N=12, C=5, dtype=torch.float64, per_sample=False, seed=0):
    """logits, targets and a symmetric K with zero diagonal."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(N, C, generator=generator, dtype=dtype)
    y = torch.randint(C, (N,), generator=generator)
    shape = (N, C, C) if per_sample else (C, C)
    K = torch.rand(shape, generator=generator, dtype=dtype) + 0.2
    return f, y, (K + K.mT) * (1 - torch.eye(C, dtype=dtype))


# Every loss as loss(logits, targets, K), for properties that all share
LOSSES = {
    **{
        f"cll {offset}": lambda f, y, K, offset=offset, **kw: cll_loss(
            f, y, K, epsilon=0.15, p=0.3, offset=offset, **kw
        )
        for offset in OFFSETS
    },
    "cll per-logit": lambda f, y, K, **kw: cll_loss(
        f, y, K.reshape(-1, *K.shape[-2:])[0, 0] + 0.5, epsilon=0.15, p=0.3, **kw
    ),
    "gloro": lambda f, y, K, **kw: gloro_loss(f, y, K, epsilon=0.3, **kw),
    "gloro trades": lambda f, y, K, **kw: gloro_loss(f, y, K, epsilon=0.3, trades=1.2, **kw),
    "certificate": lambda f, y, K, **kw: certificate_regularized_loss(f, y, K, gamma=0.4, **kw),
    "aol": lambda f, y, K, **kw: aol_loss(f, y, **kw),
    "hinge": lambda f, y, K, **kw: hinge_loss(f, y, **kw),
    "local": lambda f, y, K, **kw: local_bcp_loss(f, y, K, epsilon=0.3, kappa=0.25, **kw),
    "binary": lambda f, y, K, **kw: binary_cll_loss(
        f[:, 0], (y > 1).long(), K[..., 0, 1], epsilon=0.15, p=0.3, **kw
    ),
}
WITHOUT_K = ("aol", "hinge")
every_loss = pytest.mark.parametrize("name", LOSSES)


# ----------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("epsilon, p, printed", PUBLISHED)
def test_inverse_scale_is_the_published_lipschitz_constant(epsilon, p, printed):
    assert f"{1 / cll_scale(epsilon, p):.1f}" == printed


def test_scale_puts_half_of_p_outside_each_side():
    for epsilon, p in [(0.15, 0.01), (0.15, 0.5), (1.0, 0.025)]:
        sigma = cll_scale(epsilon, p)
        assert 1 / (1 + math.exp(epsilon / sigma)) == pytest.approx(p / 2, rel=1e-12)
        assert 1 / (1 + math.exp(-epsilon / sigma)) == pytest.approx(1 - p / 2, rel=1e-12)
    assert cll_scale(0.15, 0.01) == pytest.approx(0.028338, abs=5e-7)
    assert cll_scale(0.15, 0.5) == pytest.approx(0.136536, abs=5e-7)


@pytest.mark.parametrize("p", [1e-300, 1e-15, 1e-12, 1e-3, 0.5, 1 - 1e-9])
def test_scale_is_exact_at_the_ends_of_p(p):
    from fractions import Fraction

    q = Fraction(p)  # the exact rational value of the float
    odds = (2 - q) / q
    exact = 0.15 / (math.log1p(float(odds - 1)) if p > 0.1 else math.log(odds))
    assert cll_scale(0.15, p) == pytest.approx(exact, rel=1e-13)
    tensor = cll_scale(0.15, torch.tensor(p, dtype=torch.float64))
    assert tensor.item() == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("p", [0, 1, 2, -0.1, math.nan])
def test_scale_refuses_p_outside_the_open_unit_interval(p):
    with pytest.raises(ValueError, match=r"p = .* lies in \(0, 1\)"):
        cll_scale(0.15, p)


@pytest.mark.parametrize("epsilon", [0, -1, math.inf, math.nan])
def test_scale_refuses_epsilon_that_is_no_margin(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        cll_scale(epsilon, 0.1)


# ----------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
def test_cll_equals_its_formula_sample_by_sample(offset, per_sample):
    f, y, K = batch(per_sample=per_sample)
    epsilon, p = 0.15, 0.3
    sigma = epsilon / math.log((2 - p) / p)
    values = cll_loss(f, y, K, epsilon=epsilon, p=p, offset=offset, reduction="none")
    at_y, elsewhere = {"two-sided": (-1, 1), "one-sided": (0, 1), "none": (0, 0)}[offset]
    for n in range(len(f)):
        t, bound = y[n].item(), K[n] if per_sample else K
        z = [
            (at_y if j == t else elsewhere) * epsilon / sigma
            + (0 if j == t else (f[n, j] - f[n, t]).item() / (bound[t, j].item() * sigma))
            for j in range(f.shape[1])
        ]
        expected = math.log(sum(math.exp(v) for v in z)) - z[t]
        assert values[n].item() == pytest.approx(expected, rel=1e-12)


def test_per_logit_cll_divides_each_logit_by_its_own_bound():
    f, y, K = batch()
    bounds = torch.tensor([0.5, 1, 2, 4, 8], dtype=torch.float64)
    sigma = cll_scale(0.15, 0.3)
    z = f / (bounds * sigma) + 0.15 / sigma
    z[torch.arange(len(y)), y] -= 2 * 0.15 / sigma
    expected = F.cross_entropy(z, y)
    torch.testing.assert_close(cll_loss(f, y, bounds, epsilon=0.15, p=0.3), expected)


def test_binary_cll_is_softplus_of_the_missing_margin():
    epsilon, p, K = 0.15, 0.01, 3.0
    sigma = cll_scale(epsilon, p)
    scores = torch.linspace(-2, 2, 41, dtype=torch.float64)
    for target, sign in [(1, 1), (0, -1)]:
        targets = torch.full((41,), target)
        values = binary_cll_loss(scores, targets, K, epsilon=epsilon, p=p, reduction="none")
        d = sign * scores / K
        torch.testing.assert_close(values, torch.log1p(torch.exp((epsilon - d) / sigma)))
    on_margin = binary_cll_loss(
        torch.tensor([epsilon * K], dtype=torch.float64), torch.tensor([1]), K, epsilon=epsilon, p=p
    )
    assert on_margin.item() == pytest.approx(math.log(2), rel=1e-12)
    on_boundary = binary_cll_loss(
        torch.zeros(1, dtype=torch.float64), torch.tensor([0]), K, epsilon=epsilon, p=p
    )
    assert on_boundary.item() == pytest.approx(-math.log(p / 2), rel=1e-12)


def test_binary_cll_is_one_sided_multinomial_cll_of_two_classes():
    f, y, _ = batch(C=2)
    K = torch.tensor([[0, 2.5], [2.5, 0]], dtype=torch.float64)
    for p in (1e-15, 0.3):
        a = cll_loss(f, y, K, epsilon=0.15, p=p, offset="one-sided", reduction="none")
        b = binary_cll_loss(f[:, 1] - f[:, 0], y, 2.5, epsilon=0.15, p=p, reduction="none")
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_two_sided_offset_asks_for_twice_the_margin():
    f, y, _ = batch(C=2)
    K = torch.tensor([[0, 2.5], [2.5, 0]], dtype=torch.float64)
    sigma = cll_scale(0.15, 0.3)
    d = (2 * y - 1) * (f[:, 1] - f[:, 0]) / 2.5
    values = cll_loss(f, y, K, epsilon=0.15, p=0.3, reduction="none")
    torch.testing.assert_close(values, F.softplus((0.3 - d) / sigma), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kappa", [2**0.5, 0.3])
@pytest.mark.parametrize("offset, temperature", [(2**0.5 * 1.5, 0.25), (2**0.5, 0.25), (0.7, 1.0)])
def test_aol_loss_is_two_sided_cll_with_a_constant_bound(offset, temperature, kappa):
    f, y, _ = batch()
    epsilon, sigma = offset / (2 * kappa), temperature / kappa
    p = 2 / (1 + math.exp(epsilon / sigma))
    assert aol_as_cll(offset, temperature, kappa) == pytest.approx((epsilon, p), rel=1e-12)
    assert cll_scale(epsilon, p) == pytest.approx(sigma, rel=1e-12)
    K = kappa * (1 - torch.eye(5, dtype=torch.float64))
    a = aol_loss(f, y, offset=offset, temperature=temperature) / temperature
    torch.testing.assert_close(a, cll_loss(f, y, K, epsilon=epsilon, p=p))


def test_sll_setting_in_terms_of_cll():
    epsilon, sigma = 2**0.5 * 1.5 / (2 * 2**0.5), 0.25 / 2**0.5
    assert epsilon == pytest.approx(0.75)
    assert 1 / sigma == pytest.approx(5.66, abs=0.005)
    assert 2 / (1 + math.exp(epsilon / sigma)) == pytest.approx(0.028, abs=5e-4)


def test_gloro_equals_its_formula_sample_by_sample():
    f, y, K = batch()
    values = gloro_loss(f, y, K, epsilon=0.3, reduction="none")
    for n in range(len(f)):
        j = f[n].argmax().item()
        bottom = max((f[n, i] + 0.3 * K[j, i]).item() for i in range(5) if i != j)
        z = [*f[n].tolist(), bottom]
        expected = math.log(sum(map(math.exp, z))) - z[y[n]]
        assert values[n].item() == pytest.approx(expected, rel=1e-12)


def test_gloro_does_not_certify_ties():
    """f = (0, 0): whatever K, the extra logit is at least as large as both; it wins for K > 0."""
    f, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    K = torch.tensor([[0, 2.0], [2.0, 0]], dtype=torch.float64)
    probability = math.exp(-gloro_loss(f, y, K, epsilon=0.5).item())
    assert probability == pytest.approx(1 / (2 + math.e), rel=1e-12)  # bottom = 0 + 0.5 * 2 = 1
    nothing = math.exp(-gloro_loss(f, y, K, epsilon=0.0).item())
    assert nothing == pytest.approx(1 / 3, rel=1e-12)


def test_gloro_cannot_be_asked_for_the_extra_logit():
    f, _, K = batch(N=1)
    with pytest.raises(ValueError, match=r"outside 0\.\.4"):
        gloro_loss(f, torch.tensor([5]), K, epsilon=0.1)


def test_gloro_bottom_logit_sees_a_third_class_with_a_larger_bound():
    f, y = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64), torch.tensor([0])
    K = torch.tensor([[0, 1, 30], [1, 0, 1], [30, 1, 0]], dtype=torch.float64)
    expected = F.cross_entropy(torch.tensor([[3.0, 2, 1, 4]], dtype=torch.float64), y)  # 1 + .1*30
    torch.testing.assert_close(gloro_loss(f, y, K, epsilon=0.1), expected)


def test_trades_term_is_the_divergence_between_plain_and_robust_prediction():
    f, y, K = batch()
    f.requires_grad_()
    robust = gloro_loss(f, y, K, epsilon=0.3, trades=1.2)
    j = f.argmax(dim=1)
    candidates = (f + 0.3 * K[j]).scatter(1, j[:, None], -math.inf)
    log_q = torch.cat([f, candidates.amax(dim=1, keepdim=True)], dim=1).log_softmax(dim=1)
    log_p = f.log_softmax(dim=1)
    for prediction in (log_p, log_p.detach()):
        divergence = (prediction.exp() * (prediction - log_q[:, :-1])).sum(dim=1)
        expected = (F.cross_entropy(f, y, reduction="none") + 1.2 * divergence).mean()
        torch.testing.assert_close(robust, expected)
        (a,) = torch.autograd.grad(robust, f, retain_graph=True)
        (b,) = torch.autograd.grad(expected, f, retain_graph=True)
        torch.testing.assert_close(a, b)


def test_trades_form_of_the_papers_code_is_ours_at_one_more_and_an_entropy():
    f, y, K = batch()
    f.requires_grad_()
    j = f.argmax(dim=1)
    candidates = (f + 0.3 * K[j]).scatter(1, j[:, None], -math.inf)
    log_q = torch.cat([f, candidates.amax(dim=1, keepdim=True)], dim=1).log_softmax(dim=1)
    p = f.softmax(dim=1).detach()
    theirs = F.nll_loss(log_q[:, :-1], y) - 1.2 * (p * log_q[:, :-1]).sum(dim=1).mean()
    ours = gloro_loss(f, y, K, epsilon=0.3, trades=2.2)
    torch.testing.assert_close(theirs, ours - 1.2 * (p * p.log()).sum(dim=1).mean())
    (a,) = torch.autograd.grad(ours, f, retain_graph=True)
    (b,) = torch.autograd.grad(theirs, f)
    torch.testing.assert_close(a, b)


def test_certificate_regularisation_rewards_the_certified_radius_only():
    f = torch.tensor([[3.0, 1, 0], [0, 1, 5]], dtype=torch.float64)
    y = torch.tensor([0, 0])  # right and wrong
    K = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]], dtype=torch.float64)
    values = certificate_regularized_loss(f, y, K, gamma=0.4, reduction="none")
    cross_entropy = F.cross_entropy(f, y, reduction="none")
    radius = torch.tensor([1.5, 0], dtype=torch.float64)  # min(2 / 1, 3 / 2); none if wrong
    torch.testing.assert_close(values, cross_entropy - 0.4 * radius)


def test_hinge_is_the_multi_margin_loss_of_pytorch():
    f, y, _ = batch()
    for margin in (0.7, 2.0):
        values = hinge_loss(f, y, margin=margin, reduction="none")
        torch.testing.assert_close(
            values, F.multi_margin_loss(f, y, margin=margin, reduction="none")
        )
    certain = 10 * F.one_hot(y, 5).double()
    assert hinge_loss(certain, y).item() == 0


@pytest.mark.parametrize("per_sample", [False, True])
def test_local_bcp_equals_its_formula_sample_by_sample(per_sample):
    f, y, K = batch(per_sample=per_sample)
    values = local_bcp_loss(f, y, K, epsilon=0.3, kappa=0.25, reduction="none")
    for n in range(len(f)):
        t, bound = y[n].item(), K[n] if per_sample else K
        worst = [f[n, j].item() + (0 if j == t else 0.3 * bound[t, j].item()) for j in range(5)]
        clean, worst = (math.log(sum(map(math.exp, z))) - z[t] for z in (f[n].tolist(), worst))
        assert values[n].item() == pytest.approx(0.25 * clean + 0.75 * worst, rel=1e-12)


def test_local_bcp_starts_as_cross_entropy_and_ignores_the_diagonal():
    f, y, K = batch()
    for ramp in ({"epsilon": 0.3, "kappa": 1.0}, {"epsilon": 0.0, "kappa": 0.0}):
        torch.testing.assert_close(local_bcp_loss(f, y, K, **ramp), F.cross_entropy(f, y))
    holes = K.clone().fill_diagonal_(math.nan).requires_grad_()
    loss = local_bcp_loss(f, y, holes, epsilon=0.3, kappa=0.5)
    torch.testing.assert_close(loss, local_bcp_loss(f, y, K, epsilon=0.3, kappa=0.5))
    (gradient,) = torch.autograd.grad(loss, holes)
    assert gradient.isfinite().all() and (gradient.diagonal() == 0).all()


@pytest.mark.parametrize("kappa", [-0.1, 1.5, math.nan])
def test_local_bcp_refuses_a_weight_outside_the_unit_interval(kappa):
    f, y, K = batch()
    with pytest.raises(ValueError, match="kappa"):
        local_bcp_loss(f, y, K, epsilon=0.3, kappa=kappa)


@pytest.mark.parametrize("margin", [0, -1, math.inf, math.nan])
def test_hinge_refuses_what_is_no_margin(margin):
    f, y, _ = batch()
    with pytest.raises(ValueError, match="margin"):
        hinge_loss(f, y, margin=margin)


def test_penalty_is_lambda_times_the_largest_bound_squared():
    _, _, K = batch()
    assert lipschitz_penalty(K, 1e-4).item() == pytest.approx(1e-4 * K.max().item() ** 2)
    stack = torch.stack([K, 3 * K])
    assert lipschitz_penalty(stack, 2.0).item() == pytest.approx(18 * K.max().item() ** 2)


# ------------------------------------------------------------------------------ gradients, types


@every_loss
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_agree_with_finite_differences(name, per_sample):
    f, y, K = batch(N=6, C=4, per_sample=per_sample)
    f.requires_grad_(), K.requires_grad_()
    assert torch.autograd.gradcheck(lambda f, K: LOSSES[name](f, y, K), (f, K), atol=1e-6)


@every_loss
def test_vmap_over_runs_equals_a_loop(name):
    runs = [batch(seed=seed) for seed in range(3)]
    f, y, K = (torch.stack(parts) for parts in zip(*runs, strict=True))
    f.requires_grad_(), K.requires_grad_()
    stacked = vmap(LOSSES[name])(f, y, K)
    looped = torch.stack([LOSSES[name](f[r], y[r], K[r]) for r in range(3)])
    torch.testing.assert_close(stacked, looped)
    wanted = [f, K] if name not in WITHOUT_K else [f]
    for a, b in zip(
        torch.autograd.grad(stacked.sum(), wanted),
        torch.autograd.grad(looped.sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def sum_of_losses(f, y, K, epsilon, p):
    """The sum of all losses but the binary one."""
    return (
        cll_loss(f, y, K, epsilon=epsilon, p=p, offset="one-sided")
        + cll_loss(f, y, K[0] + 1, epsilon=epsilon, p=p)
        + gloro_loss(f, y, K, epsilon=epsilon)
        + gloro_loss(f, y, K, epsilon=epsilon, trades=p)
        + certificate_regularized_loss(f, y, K, gamma=p)
        + aol_loss(f, y, offset=epsilon, temperature=p + 0.1)
        + hinge_loss(f, y, margin=epsilon)
        + local_bcp_loss(f, y, K, epsilon=epsilon, kappa=p)
        + lipschitz_penalty(K, p)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vmap_with_one_margin_and_slack_per_run(dtype):
    f, y, K = (torch.stack([part] * 3) for part in batch(dtype=dtype))
    epsilon = torch.tensor([0.1, 0.15, 1.0], dtype=torch.float64)
    p = torch.tensor([0.3, 1e-15, 0.9], dtype=torch.float64)

    def loss(f, y, K, epsilon, p):
        binary = binary_cll_loss(f[:, 0], y % 2, K[0, 1], epsilon=epsilon, p=p)
        return sum_of_losses(f, y, K, epsilon, p) + binary

    stacked = vmap(loss)(f, y, K, epsilon, p)
    looped = [
        loss(f[r], y[r], K[r], epsilon[r].item(), torch.tensor(p[r].item(), dtype=dtype))
        for r in range(3)
    ]
    torch.testing.assert_close(stacked.to(dtype), torch.stack(looped), rtol=1e-5, atol=1e-5)
    sole = vmap(lambda f, y, K, e, p: cll_loss(f, y, K, epsilon=e, p=p))(f, y, K, epsilon, p)
    assert sole.dtype == dtype


@every_loss
def test_reductions(name):
    f, y, K = batch()
    values = LOSSES[name](f, y, K, reduction="none")
    assert values.shape == (len(f),)
    torch.testing.assert_close(LOSSES[name](f, y, K, reduction="sum"), values.sum())
    torch.testing.assert_close(LOSSES[name](f, y, K), values.mean())


@every_loss
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_computed_in_float32(name, low):
    """Under autocast a network hands over rounded logits; the loss adds no error of its own."""
    f, y, K = batch(dtype=torch.float32)
    f = f.to(low)
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name](f, y, K)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[name](f.float(), y, K), rtol=1e-6, atol=1e-6)
    double = LOSSES[name](f.double(), y, K.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(value.double(), double, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------- invariance, extremes


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("c", [1e-6, 0.5, 1e8])
def test_cll_does_not_change_when_logits_and_bound_scale_together(c, offset):
    f, y, K = batch()
    for bound in (K, K[0] + 1):
        a = cll_loss(f, y, bound, epsilon=0.15, p=0.01, offset=offset)
        b = cll_loss(c * f, y, c * bound, epsilon=0.15, p=0.01, offset=offset)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


@every_loss
def test_placeholder_on_the_diagonal_is_never_used(name):
    if name == "cll per-logit":
        pytest.skip("no diagonal")
    f, y, K = batch()
    results = []
    for placeholder in (0.0, 1.0, 7.0, math.nan):
        bound = K.clone().fill_diagonal_(placeholder).requires_grad_()
        logits = f.clone().requires_grad_()
        value = LOSSES[name](logits, y, bound)
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        results.append(torch.cat([value.detach()[None], gradient.flatten()]))
        if name not in WITHOUT_K:
            (to_K,) = torch.autograd.grad(value, bound)
            assert to_K.isfinite().all() and (to_K.diagonal() == 0).all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


@every_loss
@pytest.mark.parametrize("K_value", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_many_classes_and_zero_bounds_stay_finite(name, K_value, dtype):
    C = 200
    f = (torch.rand(16, C, dtype=dtype) - 0.5) * 2e4
    f[0], f[1] = 0, 1e4 * torch.eye(C, dtype=dtype)[3]
    y = torch.randint(C, (16,))
    K = torch.full((C, C), K_value, dtype=dtype).fill_diagonal_(0)
    if name == "binary" and K_value == 0:
        pytest.skip("a scalar bound of 0 is an error")
    f.requires_grad_(), K.requires_grad_()
    value = LOSSES[name](f, y, K)
    assert value.isfinite()
    for gradient in torch.autograd.grad(value, [f] if name in WITHOUT_K else [f, K]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smallest_slack_of_the_paper_is_stable(dtype, offset):
    f, y, K = batch(N=32, C=200, dtype=dtype)
    f = (f * 1e4).requires_grad_()
    value = cll_loss(f, y, K, epsilon=0.15, p=1e-15, offset=offset)
    (gradient,) = torch.autograd.grad(value, f)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 0
    exact = cll_loss(f.detach().double(), y, K.double(), epsilon=0.15, p=1e-15, offset=offset)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    # on the boundary between two classes the price of slack is -ln(p/2), here 35.2
    tie = torch.zeros(1, 2, dtype=dtype)
    bound = torch.ones(2, 2, dtype=dtype)
    price = cll_loss(
        tie, torch.tensor([0]), bound, epsilon=0.15, p=1e-15, offset="one-sided"
    ).item()
    assert price == pytest.approx(-math.log(0.5e-15), rel=1e-6)


def test_a_nan_bound_shows_in_the_loss():
    f, y, K = batch()
    for name in ("cll two-sided", "gloro", "gloro trades", "certificate"):
        assert LOSSES[name](f, y, torch.full_like(K, math.nan)).isnan(), name


class _LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@every_loss
def test_nothing_larger_than_logits_or_bound_is_allocated(name):
    N, C = 5000, 200
    f, y, K = batch(N, C, dtype=torch.float32)
    f.requires_grad_(), K.requires_grad_()
    with _LargestTensor() as seen:
        LOSSES[name](f, y, K).backward()
    assert seen.largest <= 4 * N * (C + 1)


# -------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("start, end, power", [(1e-3, 1e-15, 50), (0.01, 1.0, 10), (0.0, 0.15, 5)])
def test_schedules_are_exact_at_both_ends_and_monotone(start, end, power):
    assert polynomial_schedule(start, end, power, 0.0) == start
    assert polynomial_schedule(start, end, power, 1.0) == end
    assert polynomial_schedule(start, end, power, 1 + 1e-9) == end
    values = [polynomial_schedule(start, end, power, t / 100) for t in range(101)]
    assert values == sorted(values, reverse=start > end)
    for t in (0.1, 0.5, 0.9):
        expected = end + (start - end) * (1 - t) ** power
        assert polynomial_schedule(start, end, power, t) == pytest.approx(expected, rel=1e-12)


def test_schedules_of_the_published_runs():
    p = [polynomial_schedule(1e-3, 1e-15, 50, step / 20020) for step in (1000, 10000)]
    assert p[0] == pytest.approx(7.7e-5, rel=0.01)
    assert p[1] == pytest.approx(1.0009e-15, rel=1e-3)
    # 8C2F: 1 - 0.99 (1 - t)^10
    assert polynomial_schedule(0.01, 1, 10, 0.3) == pytest.approx(1 - 0.99 * 0.7**10)
    stack = polynomial_schedule(torch.zeros(2), torch.tensor([0.1, 0.2]), 5, torch.tensor(1.0))
    assert torch.equal(stack, torch.tensor([0.1, 0.2]))


# ------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offset": "both"}, "'two-sided', 'one-sided', 'none'"),
        ({"reduction": "avg"}, "'mean', 'sum', 'none'"),
        ({"p": 0.0}, r"\(0, 1\)"),
        ({"p": 2}, r"\(0, 1\)"),
        ({"epsilon": -0.1}, "epsilon = -0.1"),
        ({"logits": torch.zeros(5)}, r"shape \(N, C\)"),
        ({"logits": torch.zeros(12, 5, dtype=torch.int64)}, "floating point"),
        ({"targets": torch.zeros(12)}, "int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"shape \(12,\)"),
        ({"targets": torch.full((12,), 5)}, r"outside 0\.\.4"),
        ({"targets": torch.full((12,), -1)}, r"outside 0\.\.4"),
        ({"targets": torch.full((12,), -100)}, r"outside 0\.\.4"),
        ({"K": torch.ones(4, 4)}, r"\(5,\) or \(5, 5\) or \(12, 5, 5\), got \(4, 4\)"),
        ({"K": 2.0}, "got float"),
    ],
)
def test_bad_arguments_are_named(change, message):
    f, y, K = batch()
    arguments = {"logits": f, "targets": y, "K": K, "epsilon": 0.15, "p": 0.3} | change
    with pytest.raises(ValueError, match=message) as error:
        cll_loss(**arguments)
    assert "\n" not in str(error.value)


def test_binary_bad_arguments_are_named():
    scores, targets = torch.zeros(3), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        binary_cll_loss(scores, targets, 1.0, epsilon=0.1, p=0.1)
    with pytest.raises(ValueError, match="K = 0"):
        binary_cll_loss(scores, targets % 2, 0, epsilon=0.1, p=0.1)
    with pytest.raises(ValueError, match="use cll_loss"):
        binary_cll_loss(torch.zeros(3, 2), targets % 2, 1.0, epsilon=0.1, p=0.1)
    with pytest.raises(ValueError, match="temperature"):
        aol_loss(torch.zeros(3, 2), targets % 2, temperature=0)
