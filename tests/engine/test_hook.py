"""A modality's own derivatives: used where they are there, refused where they are wrong, the same as differentiation."""

import gc
import math

import pytest
import torch
from torch.distributions import Uniform

from engine import Evidence, Modality, ModalityError, Parameter, ParameterSpace
from engine.estimate import estimate
from engine.observations import Observations
from engine.terms import Term
from modalities import Constraint, Gaussian, PoissonCounts, StudentT

F64 = torch.float64
AB = ParameterSpace([Parameter("a", Uniform(-5.0, 5.0)), Parameter("b", Uniform(-5.0, 5.0))])


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Curve(Modality):
    """x ~ N(a + b² / 2 + a b, 1) with its derivatives in closed form, which ``change`` may spoil."""

    def __init__(self, parameter_names=("a", "b"), change=None):
        super().__init__(parameter_names=parameter_names, event_shape=())
        self.change, self.calls, self.prepared = change, 0, 0

    def log_evidence(self, x, theta):
        return -0.5 * (x - self.mean(theta)) ** 2

    def mean(self, theta):
        a, b = theta[..., 0], theta[..., 1]
        return a + 0.5 * b**2 + a * b

    def derivatives(self, x, theta):
        self.calls += 1
        a, b = theta[..., 0], theta[..., 1]
        residual = x - self.mean(theta)
        slope = torch.stack([1.0 + b, b + a], -1)
        bend = theta.new_tensor([[0.0, 1.0], [1.0, 1.0]])
        information = slope[..., :, None] * slope[..., None, :] - residual[..., None, None] * bend
        found = -0.5 * residual**2, residual[..., None] * slope, information
        return found if self.change is None else self.change(*found)


def term(*modalities, x=None, space=AB):
    names = [f"p{i}" for i in range(len(modalities))]
    known = dict(zip(names, modalities, strict=True))
    data = {n: normals(4, *m.event_shape, seed=int(n[1:])) if x is None else x for n, m in known.items()}
    known = Observations(data, known, allow_identical=True)
    return Term(names, list(modalities), space, known)


def both(t, *args):
    """What a term gives by closed forms and by differentiation."""
    assert t.closed
    closed = t._block_derivatives(*args)
    t.closed = False
    automatic = t._block_derivatives(*args)
    t.closed = True
    return closed, automatic


def close(closed, automatic, tolerance=1e-12):
    for found, expected in zip(closed, automatic, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype == F64
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().amax()) + 1e-14)


# ---- which scalar a closed form is the closed form of


class Shifted(Curve):
    """Another scalar under the derivatives of the old one."""

    def log_evidence(self, x, theta):
        return super().log_evidence(x, theta) - (theta[..., 0] - 3.0) ** 2


class Renewed(Shifted):
    """Its author has written both."""

    def derivatives(self, x, theta):
        s, u, J = super().derivatives(x, theta)
        extra = theta.new_tensor([1.0, 0.0])
        return (
            s - (theta[..., 0] - 3.0) ** 2,
            u - 2.0 * (theta[..., :1] - 3.0) * extra,
            J + 2.0 * torch.diag_embed(extra),
        )


class Elsewhere(Curve):
    """The scalar is written in forward."""

    def forward(self, x, theta):
        return 2.0 * super().forward(x, theta)


class Mixin:
    def log_evidence(self, x, theta):
        return 2.0 * super().log_evidence(x, theta)


class Mixed(Mixin, Curve):
    pass


class Softer(Curve):
    """Another helper: what derivatives() calls is replaced too."""

    def mean(self, theta):
        return super().mean(theta) + 1.0


@pytest.mark.parametrize(
    ("cls", "used"),
    [(Curve, True), (Shifted, False), (Renewed, True), (Elsewhere, False), (Mixed, False), (Softer, True)],
)
def test_a_closed_form_is_used_for_the_very_scalar_it_was_written_for(cls, used):
    modality, theta = cls(), normals(3, 2, seed=7)
    assert modality.has_derivatives == used
    x = normals(5, seed=3)
    at = Evidence(AB, {"p": modality}, {"p": x}).derivatives(theta)
    assert (modality.calls > 0) == used
    for k, point in enumerate(theta):

        def S(t, modality=modality):
            return modality(x, t).sum()

        assert torch.allclose(at.score[k], torch.func.grad(S)(point), rtol=1e-12)
        assert torch.allclose(at.information[k], -hessian(S, point), atol=1e-11)


def hessian(S, point):
    return torch.func.jacrev(torch.func.jacrev(S))(point)


def test_a_scalar_set_on_the_instance_or_no_closed_form_at_all_is_differentiated():
    modality = Curve()
    modality.log_evidence = lambda x, theta: -((x - theta[..., 0]) ** 2)
    assert not modality.has_derivatives
    assert not Modality(("a",)).has_derivatives
    with pytest.raises(NotImplementedError, match="no closed form of its derivatives"):
        Modality(("a",)).derivatives(torch.zeros(1), torch.zeros(1))


class DoubledRate(PoissonCounts):
    def rate(self, theta):
        return 2.0 * super().rate(theta)


class OwnDensity(PoissonCounts):
    def log_evidence(self, x, theta):
        return 0.5 * super().log_evidence(x, theta)


class OwnPrepare(PoissonCounts):
    def prepare(self, x):
        return tuple(t.clone() for t in super().prepare(x))


class OwnDerivatives(PoissonCounts):
    def derivatives(self, x, theta):  # takes nothing prepared
        return super().derivatives(x, theta)


@pytest.mark.parametrize(
    ("cls", "used", "prepares", "concave"),
    [
        (PoissonCounts, True, True, True),
        (DoubledRate, False, True, False),
        (OwnDensity, False, True, False),
        (OwnPrepare, True, True, True),
        (OwnDerivatives, True, False, True),
    ],
)
def test_a_subclass_of_a_modality_in_the_tree_is_scored_as_it_is_written(cls, used, prepares, concave):
    modality = cls(signal=[5.0, 9.0], background=[50.0, 40.0], strength="a")
    assert (modality.has_derivatives, modality.prepares, modality.concave) == (used, prepares, concave)
    n, theta = torch.tensor([[57.0, 49.0], [60.0, 38.0]], dtype=F64), torch.tensor([[1.3, 0.0]], dtype=F64)
    at = Evidence(AB, {"p": modality}, {"p": n}).derivatives(theta)
    leaf = theta[:, :1].clone().requires_grad_()
    (score,) = torch.autograd.grad(modality(n, leaf).sum(), leaf)
    assert float(at.score[0, 0]) == pytest.approx(float(score), rel=1e-12)


class Bowl(Modality):
    concave = True

    def __init__(self, parameter_names=("a",)):
        super().__init__(parameter_names=parameter_names)

    def log_evidence(self, x, theta):
        return -((x - theta[..., 0]) ** 2)


class Wave(Bowl):
    def log_evidence(self, x, theta):
        return theta[..., 0].sin() * x


class Sharper(Bowl):
    concave = True

    def log_evidence(self, x, theta):
        return 2.0 * super().log_evidence(x, theta)


class Named(Bowl):
    pass


def test_a_claim_of_concavity_is_not_inherited_with_another_scalar():
    assert [cls().concave for cls in (Bowl, Wave, Sharper, Named)] == [True, False, True, True]
    assert not Curve().concave


# ---- the same numbers as differentiation


@pytest.mark.parametrize("count", [1, 3])
def test_a_closed_form_gives_what_differentiation_gives(count):
    class Stacked(Curve):
        def stack_key(self):
            return "curve"

    t = term(*(Stacked() for _ in range(count)))
    theta = normals(7, 2, seed=1)
    x, local = next(iter(t.blocks())), theta[:, t.index].movedim(0, 1)
    close(*both(t, x, local))
    own = normals(count, 7, 4, seed=2)
    close(*both(t, own, local))
    mask = normals(count, 7, 4, seed=3) > 0
    mask[:, 2] = False
    own[~mask] = math.nan
    closed, automatic = both(t, own, local, mask)
    close(closed, automatic)
    assert all(bool((part[:, 2] == 0).all()) for part in (*closed, *automatic))
    close(t._block_derivatives(own, local, mask), [t.block_value(own, local, mask), *automatic[1:]])


def test_what_is_the_same_for_all_observations_may_come_once():
    """C⁻¹ without a batch, of size 1 and as an expanded view, with a mask and without."""
    C = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=F64)
    forms = {
        "none": lambda J, batch: J,
        "ones": lambda J, batch: J.expand(1, 1, 2, 2),
        "view": lambda J, batch: J.expand(*batch, 2, 2),
        "full": lambda J, batch: J.expand(*batch, 2, 2).clone(),
    }

    class Form(Gaussian):
        how = "none"

        def derivatives(self, x, theta, *known):
            s, u, J = super().derivatives(x, theta, *known)
            return s, u, forms[self.how](J, u.shape[:-1])

    x, theta = normals(9, 2, seed=5), normals(3, 2, seed=6)
    mask = (torch.arange(9) % 3 > 0).expand(1, 3, 9)
    for how in forms:
        modality = Form(parameter_names=("a", "b"), covariance=C)
        modality.how = how
        t = term(modality, x=x)
        local = theta[None]
        assert torch.allclose(t.derivatives(theta)[2], 9 * torch.linalg.inv(C), rtol=1e-12), how
        found = t._block_derivatives(x[None, None], local, mask)[2]
        assert torch.allclose(found, 6 * torch.linalg.inv(C), rtol=1e-12), how


def test_a_float32_plugin_stays_in_float32_and_is_summed_in_float64():
    class Weighted(Curve):
        def __init__(self, parameter_names=("a", "b")):
            super().__init__(parameter_names)
            self.register_buffer("weight", torch.tensor(1.0, dtype=torch.float32))
            self.seen = set()

        def derivatives(self, x, theta):
            self.seen |= {x.dtype, theta.dtype}
            return super().derivatives(x, theta)

    modality = Weighted()
    t = term(modality)
    closed, automatic = both(t, next(iter(t.blocks())), normals(1, 7, 2))
    assert modality.seen == {torch.float32}
    close(closed, automatic, tolerance=1e-5)


@pytest.mark.parametrize("impossible", [-math.inf, math.nan])
def test_a_masked_entry_leaves_no_trace_in_value_or_derivatives(impossible):
    """Neither −∞ nor NaN where the mask is false, nor a scalar that raises there, nor a gradient of 0 · NaN."""

    class Strict(Modality):
        def __init__(self, parameter_names=("a", "b")):
            super().__init__(parameter_names=parameter_names)

        def log_evidence(self, x, theta):
            if bool((x < 0).any()):
                raise ValueError("x must be >= 0")
            return -((x.sqrt() - theta[..., 0]) ** 2) - torch.where(x > 50.0, math.inf, theta[..., 1] ** 2)

    t = term(Strict(), x=torch.tensor([1.0, 4.0]).double())
    x = torch.tensor([[[1.0, 4.0, 9.0], [impossible, 4.0, -7.0]]], dtype=F64)
    mask = torch.tensor([[[True, True, False], [False, True, False]]])
    x[0, 0, 2] = 99.0 if impossible < 0 else math.nan
    theta = torch.tensor([[[1.5, 0.3], [0.2, 0.4]]], dtype=F64)
    value, score, information, resolution = t._block_derivatives(x, theta, mask)
    for k, rows in enumerate([[1.0, 4.0], [4.0]]):
        a, b = theta[0, k]
        root = torch.tensor(rows, dtype=F64).sqrt()
        assert float(value[0, k]) == pytest.approx(float((-((root - a) ** 2) - b**2).sum()), rel=1e-14)
        assert score[0, k].tolist() == pytest.approx([float(2 * (root - a).sum()), float(-2 * b * len(rows))])
        assert torch.allclose(information[0, k], 2.0 * len(rows) * torch.eye(2, dtype=F64))
        assert float(resolution[0, k]) == pytest.approx(abs(float(value[0, k])) * torch.finfo(F64).eps)
    assert torch.equal(t.block_value(x, theta, mask), value)
    t.refuse_bad_block(x, theta, mask)


def test_a_bad_scalar_that_counts_is_named_with_its_observation():
    class Bad(Curve):
        def log_evidence(self, x, theta):
            return torch.where(x > 50.0, math.nan, super().log_evidence(x, theta))

    t = term(Bad())
    x = torch.tensor([[[1.0, 2.0], [3.0, 99.0]]], dtype=F64)
    theta = torch.zeros(1, 2, 2, dtype=F64)
    t.refuse_bad_block(x, theta, torch.tensor([[[True, True], [True, False]]]))
    with pytest.raises(ModalityError, match="got nan from plugin 'p0' at a = 0, b = 0, observation 11"):
        t.refuse_bad_block(x, theta, torch.tensor([[[False, True], [True, True]]]), start=10)


def test_threads_and_chunks_do_not_change_a_bit():
    counts = PoissonCounts(
        background={"a": normals(50).abs() + 1, "b": normals(50, seed=1).abs() + 1}, scale={"a": "a", "b": "b"}
    )
    t = term(counts, x=torch.poisson(torch.full((3000, 50), 3.0), generator=torch.Generator().manual_seed(0)))
    theta = 1.0 + 0.1 * normals(3, 2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(t.derivatives(theta))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


# ---- what is kept of x


class Prepared(Curve):
    def prepare(self, x):
        self.prepared += 1
        return (2.0 * x,)

    def derivatives(self, x, theta, double=None):
        return super().derivatives(x if double is None else 0.5 * double, theta)


def test_what_a_plugin_makes_of_x_is_made_once_and_again_where_x_has_changed():
    modality = Prepared()
    t = term(modality)
    x, theta = normals(1, 3, 4, seed=2), normals(1, 3, 2)
    close(*both(t, x, theta))
    made = modality.prepared
    t._block_derivatives(x, theta + 1.0)
    t.block_value(x, theta)
    assert modality.prepared == made
    x += 1.0
    close(*both(t, x, theta))
    assert modality.prepared == made + 1
    mask = normals(1, 3, 4) > 0
    masked = t._block_derivatives(x, theta, mask)
    mask ^= True
    other = t._block_derivatives(x, theta, mask)
    total = t._block_derivatives(x, theta)
    for one, two, whole in zip(masked, other, total, strict=True):
        assert torch.allclose(one + two, whole, rtol=1e-12, atol=1e-12)
    del x
    gc.collect()
    assert len(t._prepared) <= 2  # of the block of its own, and of nothing that is gone


@pytest.mark.parametrize("masked", [False, True])
def test_some_of_the_data_sets_keep_what_was_made_of_all(masked):
    modality = Prepared()
    t = term(modality)
    x, theta = normals(1, 5, 4, seed=2), normals(1, 5, 2)
    mask = (normals(1, 5, 4) > 0) if masked else None
    if mask is not None:
        x = torch.where(mask, x, math.nan)
    whole = t._block_derivatives(x, theta, mask)
    made, items = modality.prepared, torch.tensor([3, 0, 3])
    part, here = t.pick(x, items, mask)
    assert torch.equal(part.nan_to_num(), x[:, items].nan_to_num())
    some = t._block_derivatives(part, theta[:, items], here)
    assert modality.prepared == made
    for all_of_them, few in zip(whole, some, strict=True):
        assert torch.allclose(few, all_of_them[:, items], rtol=1e-14)


def test_a_value_is_the_closed_one_only_where_no_gradient_is_asked_for():
    modality = Prepared()
    t = term(modality)
    x, theta = normals(1, 3, 4, seed=2), normals(1, 3, 2)
    modality.calls = 0
    value = t.block_value(x, theta)
    assert modality.calls > 0
    leaf = theta.clone().requires_grad_()
    again = t.block_value(x, leaf)
    assert torch.allclose(value, again, rtol=1e-14)
    (score,) = torch.autograd.grad(again.sum(), leaf)
    assert torch.allclose(score, t._block_derivatives(x, theta)[1], rtol=1e-12)


def test_what_is_prepared_must_follow_the_observations():
    class Summed(Prepared):
        def prepare(self, x):
            return (x.sum(),)

    with pytest.raises(ModalityError, match=r"prepare must return a tuple of tensors.*'p0'"):
        term(Summed()).derivatives(normals(2, 2))


# ---- rules that a closed form can break


def raises(*found):
    raise RuntimeError("no such table")


RULES = {
    "a pair": (lambda s, u, J: (s, u), "the scalar, its score and its information"),
    "None": (lambda s, u, J: None, "is a return missing"),
    "half precision": (lambda s, u, J: (s, u.half(), J), "float32 or float64 tensors, got torch.float16 as the score"),
    "a number": (lambda s, u, J: (1.0, u, J), "as the scalar from plugin 'p0'"),
    "a summed score": (lambda s, u, J: (s, u.sum(-1), J), r"the score of derivatives must have a shape"),
    "a column": (lambda s, u, J: (s, u, J[..., :1]), r"the information of derivatives must have a shape"),
    "a summed batch": (lambda s, u, J: (s.sum(-1), u, J), r"the scalar of derivatives must have a shape"),
    "an exception": (raises, "raised RuntimeError in derivatives: no such table"),
    "a flipped sign": (lambda s, u, J: (s, -u, J), "closed score of plugin 'p0' must be that of its log_evidence"),
    "a factor 2": (lambda s, u, J: (s, 2 * u, J), "closed score of plugin 'p0'"),
    "a term that is missing": (lambda s, u, J: (s, u, J + torch.eye(2)), "closed information of plugin 'p0'"),
    "another scalar": (lambda s, u, J: (s + 1.0, u, J), "closed scalar of plugin 'p0'"),
    "NaN": (lambda s, u, J: (s, u, J * math.nan), "closed information of plugin 'p0'.*got nan"),
}


@pytest.mark.parametrize(("change", "words"), RULES.values(), ids=RULES)
def test_a_closed_form_that_breaks_a_rule_is_refused_every_time(change, words):
    t = term(Curve(change=change))
    for _ in range(2):
        with pytest.raises(ModalityError, match=words) as error:
            t.derivatives(normals(3, 2))
        assert "p0" in str(error.value)


def test_a_closed_form_that_writes_to_x_is_refused():
    class Writing(Curve):
        def derivatives(self, x, theta):
            x += 1.0
            return super().derivatives(x, theta)

    with pytest.raises(ModalityError, match="changed its data in place; derivatives must leave x as it is"):
        term(Writing()).derivatives(normals(3, 2))


def test_rounding_where_a_parameter_has_no_say_is_no_fault():
    """At b = −a the score and the curvature along one parameter vanish, and their mixed derivative does not."""

    class Product(Modality):
        def __init__(self, parameter_names=("a", "b")):
            super().__init__(parameter_names=parameter_names)

        def log_evidence(self, x, theta):
            return -0.5 * (x - theta[..., 0] * theta[..., 1]) ** 2

        def derivatives(self, x, theta):
            swapped = theta.flip(-1)
            residual = x - theta[..., 0] * theta[..., 1]
            bend = (1.0 + 1e-15) * residual[..., None, None] * theta.new_tensor([[0.0, 1.0], [1.0, 0.0]])
            information = swapped[..., None] * swapped[..., None, :] - bend
            return -0.5 * residual**2, residual[..., None] * swapped + 1e-18, information

    theta = torch.tensor([[0.0, 1.3], [0.7, 0.0], [0.0, 1e9]], dtype=F64)
    for row in theta:
        t = term(Product())
        close(*both(t, next(iter(t.blocks())), row[None, None]))


def test_nan_away_from_where_it_was_compared_is_named():
    def late(value):
        return lambda s, u, J: (s, torch.where(s[..., None].abs() > 5.0, value, u), J)

    theta = torch.tensor([[0.0, 0.0], [8.0, 8.0], [0.1, 0.1]], dtype=F64)
    with pytest.raises(ModalityError, match=r"score of plugin 'p0' is nan at θ = \(8, 8\).*correct its closed form"):
        term(Curve(change=late(math.nan))).derivatives(theta)
    spoilt = term(Curve(change=lambda s, u, J: (torch.where(s.abs() > 5.0, math.nan, s), u, J)))
    with pytest.raises(ModalityError, match="closed scalar of plugin 'p0' is NaN or"):
        spoilt.derivatives(theta)


WRONG = {
    "sign of the score": lambda s, u, J: (s, -u, J),
    "score times 2": lambda s, u, J: (s, 2 * u, J),
    "sign of the information": lambda s, u, J: (s, u, -J),
    "information times 2": lambda s, u, J: (s, u, 2 * J),
    "half the information": lambda s, u, J: (s, u, 0.5 * J),
    "both times 2": lambda s, u, J: (s, 2 * u, 2 * J),
    "no off-diagonal": lambda s, u, J: (s, u, torch.diag_embed(J.diagonal(dim1=-2, dim2=-1))),
    "another scalar": lambda s, u, J: (2 * s, u, J),
}


class Wrong(PoissonCounts):
    change = None

    def derivatives(self, x, theta, constant=None):
        return self.change(*super().derivatives(x, theta, constant))


@pytest.mark.parametrize("stack", [1, 8])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_an_estimate_names_the_plugin_whose_closed_form_is_wrong(change, stack):
    right = {f"right {i}": Constraint("k", sd=1.0 + i) for i in range(stack)}
    wrong = {
        f"wrong {i}": Wrong(signal=[5.0, 9.0 + i], background={"b": [50.0, 40.0]}, scale={"k": "b"})
        for i in range(stack)
    }
    for modality in wrong.values():
        modality.change = change
    space = ParameterSpace([Parameter("mu", Uniform(0.0, 10.0)), Parameter("k", Uniform(0.0, 5.0))])
    data = {name: [[1.0 + 0.01 * i]] for i, name in enumerate(right)}
    data |= {name: [[57.0 + i, 52.0], [51.0, 49.0]] for i, name in enumerate(wrong)}
    with pytest.raises(ModalityError, match="'wrong 0'"):
        estimate(Evidence(space, right | wrong, data))


@pytest.mark.parametrize("factor", [0.7, 2.0])
def test_an_information_that_is_wrong_at_the_maximum_alone_is_found_there(factor):
    """Right wherever it is compared at first: Evidence.check has the last word."""

    class Lucky(Constraint):
        def derivatives(self, x, theta, constant=None):
            s, u, J = super().derivatives(x, theta, constant)
            return s, u, torch.where((u.abs() < 0.1)[..., None], factor, 1.0) * J

    space = ParameterSpace([Parameter("a", Uniform(-5.0, 5.0))])
    assert estimate(Evidence(space, {"p": Constraint("a", sd=0.5)}, {"p": [[1.3]]})).converged
    with pytest.raises(ModalityError, match="plugin 'p' and its derivatives disagree along 'a'"):
        estimate(Evidence(space, {"p": Lucky("a", sd=0.5)}, {"p": [[1.3]]}))


def test_a_scalar_that_cannot_be_differentiated_is_fitted_by_its_closed_form():
    """Numbers from elsewhere: numpy has no gradient, its author has."""

    class Foreign(Curve):
        def log_evidence(self, x, theta):
            return torch.from_numpy(super().log_evidence(x.detach(), theta.detach()).numpy())

        def derivatives(self, x, theta):
            return super().derivatives(x, theta)

    space = ParameterSpace([Parameter("a", Uniform(0.0, 4.0)), Parameter("b", Uniform(0.0, 4.0))])
    aux = {"fix": Constraint(("a", "b"), sd=[0.3, 0.3])}
    data = {"fix": [[1.0, 1.0]], "p": [3.0, 2.7]}
    foreign = estimate(Evidence(space, {"p": Foreign(), **aux}, data))
    known = estimate(Evidence(space, {"p": Curve(), **aux}, data))
    assert foreign.converged
    assert torch.allclose(foreign.theta, known.theta, rtol=1e-9)
    assert torch.allclose(foreign.covariance, known.covariance, rtol=1e-9)


def test_an_estimate_is_the_same_with_closed_forms_and_without(monkeypatch):
    modalities = {
        "counts": PoissonCounts(signal=[5.0, 9.0], background={"b": [50.0, 40.0]}, strength="a", scale={"b": "b"}),
        "aux": Constraint("b", kind="lognormal", sd=0.1),
        "robust": StudentT(parameter_names=("a", "b"), scale=0.5, df=4.0),
        "values": Gaussian(parameter_names=("b", "a"), covariance=[[1.0, 0.3], [0.3, 2.0]], missing=True),
    }
    data = {
        "counts": [[57.0, 49.0], [44.0, 61.0]],
        "aux": [[1.05]],
        "robust": [[1.0, 1.2], [2.2, 0.7]],
        "values": [[1.1, math.nan], [0.8, 1.9]],
    }
    space = ParameterSpace([Parameter("a", Uniform(-4.0, 9.0)), Parameter("b", Uniform(0.1, 4.0))])
    closed = estimate(Evidence(space, modalities, data))
    for cls in (PoissonCounts, Constraint, StudentT, Gaussian):
        monkeypatch.setattr(cls, "has_derivatives", False)
    automatic = estimate(Evidence(space, modalities, data))
    assert closed.status == automatic.status == "converged"
    assert torch.allclose(closed.theta, automatic.theta, rtol=1e-9)
    assert torch.allclose(closed.covariance, automatic.covariance, rtol=1e-9)
