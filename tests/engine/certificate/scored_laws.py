"""Learned scalars and simulators whose δ, A, K and J are known in closed form, for the tests of certificates."""

import torch
from torch.distributions import Normal

from engine import Modality


class Quadratic(Modality):
    """s = −½ f r' G r with r = x − M θ − c: a score that is linear in x and in θ, right or wrong as M, G, c and f are."""

    learned = True

    def __init__(self, design, metric, offset, factor=1.0, parameter_names=("a", "b")):
        super().__init__(parameter_names, event_shape=(len(design),))
        self.register_buffer("design", torch.as_tensor(design, dtype=torch.float64).clone())
        self.register_buffer("metric", torch.as_tensor(metric, dtype=torch.float64).clone())
        self.register_buffer("offset", torch.as_tensor(offset, dtype=torch.float64).clone())
        self.factor = factor

    def log_evidence(self, x, theta):
        r = x - theta @ self.design.mT - self.offset
        return -0.5 * self.factor * ((r @ self.metric) * r).sum(-1)

    @property
    def linear(self):
        """f M' G, the matrix that takes x to its score."""
        return self.factor * self.design.mT @ self.metric


class LinearLaw:
    """The simulator of x ~ N(M θ, S)."""

    def __init__(self, design, covariance):
        self.design = torch.as_tensor(design, dtype=torch.float64)
        self.covariance = torch.as_tensor(covariance, dtype=torch.float64)
        self.factor = torch.linalg.cholesky(self.covariance)

    def __call__(self, theta, generator=None):
        z = torch.randn(*theta.shape[:-1], len(self.design), generator=generator, dtype=torch.float64)
        return theta @ self.design.mT + z @ self.factor.mT

    def exact(self, parameter_names=("a", "b"), factor=1.0):
        """The true log-likelihood, times a factor, as a learned scalar."""
        zero = torch.zeros(len(self.design))
        return Quadratic(self.design, torch.linalg.inv(self.covariance), zero, factor, parameter_names)


def closed(scalar, law, theta):
    """δ (n, P), A, K and J (P, P) of a Quadratic where x ~ N(M θ, S)."""
    B = scalar.linear
    delta = (theta @ (law.design - scalar.design).mT - scalar.offset) @ B.mT
    return delta, B @ law.design, B @ law.covariance @ B.mT, B @ scalar.design


class Family(Modality):
    """s = θ·x − ½ θ' H θ − g·θ, an exponential family with the normaliser of a normal law, whatever law x has.

    δ(θ) = E[x] − H θ − g, A = ∂E[x]/∂θ, K = Var x: any three fields at all.
    """

    learned = True

    def __init__(self, normaliser, shift, parameter_names=("a", "b")):
        super().__init__(parameter_names, event_shape=(len(shift),))
        self.register_buffer("normaliser", torch.as_tensor(normaliser, dtype=torch.float64).clone())
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float64).clone())

    def log_evidence(self, x, theta):
        return (theta * (x - 0.5 * theta @ self.normaliser - self.shift)).sum(-1)


class CurvedLaw:
    """x ~ N(m(θ), L(θ) L(θ)') of two components, with m and L curved, and ∂m/∂θ not symmetric."""

    def mean(self, theta):
        a, b = theta.unbind(-1)
        return torch.stack([a + 0.3 * a * b + 0.2 * b.square(), 0.8 * b - 0.3 * a + 0.15 * a.pow(3)], -1)

    def slope(self, theta):
        a, b = theta.unbind(-1)
        rows = [[1.0 + 0.3 * b, 0.3 * a + 0.4 * b], [-0.3 + 0.45 * a.square(), 0.8 + 0.0 * b]]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    def root(self, theta):
        a, b = theta.unbind(-1)
        out = theta.new_zeros(*theta.shape, 2)
        out[..., 0, 0] = torch.exp(0.3 * a)
        out[..., 1, 0] = 0.4 * b
        out[..., 1, 1] = (1.0 + 0.5 * b.square()).sqrt()
        return out

    def __call__(self, theta, generator=None):
        z = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        return self.mean(theta) + (self.root(theta) @ z[..., None])[..., 0]


class Shape(Modality):
    """s = f(x − θ) of one number, by the name of f."""

    learned = True

    def __init__(self, kind="normal", factor=1.0, shift=0.0, parameter_names=("a",)):
        super().__init__(parameter_names, event_shape=(1,))
        self.kind, self.factor, self.shift = kind, factor, shift

    @property
    def is_ratio(self):
        return self.kind == "ratio"

    def log_evidence(self, x, theta):
        x, theta = x[..., 0], theta[..., 0]
        d = x - theta - self.shift
        if self.kind == "normal":
            return -0.5 * self.factor * d.square()
        if self.kind == "huber":  # a continuous score, whose derivative jumps
            return -torch.where(d.abs() < 1.0, 0.5 * d.square(), d.abs() - 0.5)
        if self.kind == "stairs":  # a score that jumps and in between hardly falls
            n = torch.floor(2.0 * d + 0.5)
            return -(0.5 * n * (d - 0.5 * n) + 0.125 * n.square()) - 0.02 * d.square()
        if self.kind == "ratio":  # log p(x|θ)/p(x) for θ uniform in (−1, 1), plus a constant that does not belong there
            unit = Normal(0.0, 1.0)
            return unit.log_prob(d) - (0.5 * (unit.cdf(x + 1.0) - unit.cdf(x - 1.0))).log() + self.factor - 1.0
        raise ValueError(self.kind)


class Wave(Modality):
    """−½ (x − θ)² with a ripple of the normaliser: δ(θ) = ε sin(f θ)."""

    learned = True

    def __init__(self, height, frequency, parameter_names=("a",)):
        super().__init__(parameter_names, event_shape=(1,))
        self.height, self.frequency = height, frequency

    def log_evidence(self, x, theta):
        ripple = self.height / self.frequency * torch.cos(self.frequency * theta[..., 0])
        return -0.5 * (x[..., 0] - theta[..., 0]).square() - ripple


class Network(Modality):
    """A network of x and θ."""

    learned = True

    def __init__(self, net, parameter_names=("a",)):
        super().__init__(parameter_names, event_shape=(1,))
        self.net = net

    def log_evidence(self, x, theta):
        return self.net(torch.stack(torch.broadcast_tensors(x[..., 0], theta[..., 0]), -1))[..., 0]


def unit_normal(theta, generator=None):
    """x ~ N(θ, 1)."""
    return theta + torch.randn(theta.shape, generator=generator, dtype=torch.float64)


def chi2(gap, covariance):
    """g' C⁻¹ g (n,) of gaps (n, P) with covariances (n, P, P) or (P, P)."""
    return (gap[..., None, :] @ torch.linalg.solve(covariance.expand(*gap.shape, -1), gap[..., None]))[..., 0, 0]


TRUE = LinearLaw([[1.0, 0.2], [-0.3, 1.1], [0.5, 0.4]], [[1.0, 0.3, 0.0], [0.3, 0.8, 0.1], [0.0, 0.1, 1.3]])
WRONG = Quadratic(
    [[0.9, 0.1], [-0.1, 1.0], [0.6, 0.3]], [[1.2, -0.2, 0.1], [-0.2, 1.0, 0.0], [0.1, 0.0, 0.7]], [0.10, -0.05, 0.08]
)


class Cut(Shape):
    """A scalar that calls x > 50 impossible."""

    def log_evidence(self, x, theta):
        return torch.where(x[..., 0] > 50.0, -torch.inf, super().log_evidence(x, theta))


class OwnNumbers:
    """A simulator that draws from a generator of its own, so that no two calls have numbers in common."""

    def __init__(self, simulate, seed):
        self.simulate, self.generator = simulate, torch.Generator().manual_seed(seed)

    def __call__(self, theta, generator=None):
        return self.simulate(theta, self.generator)
