"""Kinds of evidence, one a file; each imports only from :mod:`engine`.

- counts in bins, with HistFactory's systematics: :class:`PoissonCounts`
- measured values with Gaussian errors, correlated or not: :class:`Gaussian`
- measured values of which a few may be far off: :class:`StudentT`
- one category, about a hypothesis or about continuous θ: :class:`Categorical`
- auxiliary measurements of nuisance parameters: :class:`Constraint`
- any data that an encoder understands, concave in θ and learned: :class:`Quadratic`
"""

from modalities.categorical import Categorical
from modalities.constraint import Constraint
from modalities.gaussian import Gaussian
from modalities.poisson import PoissonCounts
from modalities.quadratic import Quadratic
from modalities.student_t import StudentT

__all__ = ["Categorical", "Constraint", "Gaussian", "PoissonCounts", "Quadratic", "StudentT"]
