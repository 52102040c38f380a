"""Samples of laws whose information is known, in nats."""

import math

import numpy as np
import torch
from scipy.special import digamma, gammaln


def counted(table, n, seed):
    """Posteriors as counted from n samples of a table p(x1, x2, y): of x1, of x2, of both, and p(y)."""
    rng = np.random.default_rng(seed)
    a, b, y = np.unravel_index(rng.choice(table.size, n, p=table.ravel()), table.shape)

    def posterior(key, size):
        counts = np.zeros((size, table.shape[2]))
        np.add.at(counts, (key, y), 1)
        return torch.from_numpy((counts / counts.sum(1, keepdims=True).clip(1))[key])

    n1, n2, labels = table.shape
    return posterior(a, n1), posterior(b, n2), posterior(a * n2 + b, n1 * n2), np.bincount(y, minlength=labels) / n


def two_sided(n, rho, seed):
    """θ = ±1, x_m = θ + σ_m ε with σ = (1, 2) and noise correlation ρ: posteriors of each part and of both, and s_12."""
    g = torch.Generator().manual_seed(seed)
    theta = 2.0 * torch.randint(2, (n,), generator=g).double() - 1.0
    e = torch.randn(n, 2, generator=g, dtype=torch.float64)
    e = torch.stack([e[:, 0], 2.0 * (rho * e[:, 0] + math.sqrt(1.0 - rho**2) * e[:, 1])], -1)
    x = theta[:, None] + e
    covariance = torch.tensor([[1.0, 2.0 * rho], [2.0 * rho, 4.0]], dtype=torch.float64)
    weights = torch.linalg.solve(covariance, torch.ones(2, dtype=torch.float64))

    def posterior(half):
        return torch.stack([torch.sigmoid(-2.0 * half), torch.sigmoid(2.0 * half)], -1)

    joint = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(e)
    apart = sum(torch.distributions.Normal(0.0, s).log_prob(e[:, m]) for m, s in enumerate((1.0, 2.0)))
    return posterior(x[:, 0]), posterior(x[:, 1] / 4.0), posterior(x @ weights), joint - apart


def normal(n, rng, rho=0.75):
    """Two numbers with correlation ρ: −½ ln (1 − ρ²)."""
    z = rng.standard_normal((n, 2))
    return z[:, :1], rho * z[:, :1] + math.sqrt(1.0 - rho**2) * z[:, 1:]


def two_pairs(n, rng):
    """Five numbers each, of which two pairs have correlation 0.8: −ln (1 − 0.64)."""
    x, y = rng.standard_normal((2, n, 5))
    y[:, :2] = 0.8 * x[:, :2] + 0.6 * y[:, :2]
    return x, y


def dense(d, n, rng):
    """d numbers each, all correlations ½: ½ ln (|C_d|² / |C_2d|) with |C_k| = (k + 1) / 2^k."""
    z = math.sqrt(0.5) * (rng.standard_normal((n, 2 * d)) + rng.standard_normal((n, 1)))
    return z[:, :d], z[:, d:]


def student(d, nu, n, rng):
    """Student's law of 2 d numbers without correlations, ν degrees of freedom: they share a scale."""
    z = rng.standard_normal((n, 2 * d)) / np.sqrt(rng.chisquare(nu, n) / nu)[:, None]
    return z[:, :d], z[:, d:]


def student_information(d, nu):
    """2 h(d) − h(2 d), with the entropy of Student's law of k numbers (Guerrero-Cusumano, Inf. Sci. 90 (1996) 181)."""

    def entropy(k):
        log_z = 0.5 * k * math.log(nu * math.pi) + gammaln(0.5 * nu) - gammaln(0.5 * (nu + k))
        return log_z + 0.5 * (nu + k) * (digamma(0.5 * (nu + k)) - digamma(0.5 * nu))

    return float(2.0 * entropy(d) - entropy(2 * d))


def dense_information(d):
    def log_det(k):
        return math.log(k + 1.0) - k * math.log(2.0)

    return log_det(d) - 0.5 * log_det(2 * d)


#: name -> (samples, nats), by closed forms.
FAMILIES = {
    "normal, ρ = .75": (normal, -0.5 * math.log(1.0 - 0.75**2)),
    "two pairs, 5 × 5": (two_pairs, -math.log(1.0 - 0.8**2)),
    "dense, 5 × 5": (lambda n, rng: dense(5, n, rng), dense_information(5)),
    "dense, 25 × 25": (lambda n, rng: dense(25, n, rng), dense_information(25)),
    "Student (1, 1)": (lambda n, rng: student(1, 1, n, rng), student_information(1, 1)),
    "Student (3, 2)": (lambda n, rng: student(3, 2, n, rng), student_information(3, 2)),
    "Student (5, 2)": (lambda n, rng: student(5, 2, n, rng), student_information(5, 2)),
}
