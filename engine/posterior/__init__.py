"""Posteriors from the same sum: by Laplace, importance sampling, a grid or NUTS; appended to, and taken elsewhere."""

from engine.posterior.choose import posterior
from engine.posterior.marginal import BayesFactor, MarginalLikelihood, bayes_factor
from engine.posterior.result import Posterior, PosteriorStatus

__all__ = ["BayesFactor", "MarginalLikelihood", "Posterior", "PosteriorStatus", "bayes_factor", "posterior"]
