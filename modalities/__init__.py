"""Kinds of evidence, one a file; each imports only from :mod:`engine`.

- counts in bins, with HistFactory's systematics: :class:`PoissonCounts`
- measured values with Gaussian errors, correlated or not: :class:`Gaussian`
- measured values of which a few may be far off: :class:`StudentT`
- one category, about a hypothesis or about continuous θ: :class:`Categorical`
- a model with latent variables, written in Pyro: :class:`PyroModel`
- auxiliary measurements of nuisance parameters: :class:`Constraint`
- any data that an encoder understands, concave in θ and learned: :class:`Quadratic`

Learned from simulations or labelled pairs by :func:`engine.learning.fit`, with summaries of :mod:`modalities.summaries`:

- up to some ten numbers, quick and normalised: :class:`MixtureDensity`
- continuous, discrete or mixed numbers, normalised: :class:`NeuralLikelihood`
- data of any kind, as a ratio of likelihood and evidence: :class:`NeuralRatio`
- data of any kind about few parameters, as a ratio of posterior and prior: :class:`NeuralPosterior`
- the mean of several of them: :class:`NeuralEnsemble`
- what kinds of data share that depend on each other given θ: :class:`Interaction`, trained by :func:`fit_interaction`
- what was trained with sbi: :func:`from_sbi`
"""

from modalities.categorical import Categorical
from modalities.constraint import Constraint
from modalities.from_sbi import SbiEstimator, from_sbi
from modalities.gaussian import Gaussian
from modalities.interaction import Interaction, fit_interaction
from modalities.mixture_density import MixtureDensity
from modalities.neural_ensemble import NeuralEnsemble
from modalities.neural_likelihood import NeuralLikelihood
from modalities.neural_posterior import NeuralPosterior
from modalities.neural_ratio import NeuralRatio
from modalities.poisson import PoissonCounts
from modalities.pyro_model import PyroModel
from modalities.quadratic import Quadratic
from modalities.student_t import StudentT

__all__ = [
    "Categorical",
    "Constraint",
    "Gaussian",
    "Interaction",
    "MixtureDensity",
    "NeuralEnsemble",
    "NeuralLikelihood",
    "NeuralPosterior",
    "NeuralRatio",
    "PoissonCounts",
    "PyroModel",
    "Quadratic",
    "SbiEstimator",
    "StudentT",
    "fit_interaction",
    "from_sbi",
]
