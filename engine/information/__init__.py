"""Information as a quantity of its own: what more data would tell, what to measure next, which parts depend on each other.

- :func:`forecast`: the errors to be expected after more data, also of kinds that nobody has taken yet;
- :func:`design`: the numbers of observations that make an error least within a budget;
- :func:`dependence`: whether plugins are independent given θ, and the honest error bar where they are not;
- :func:`decompose`, :func:`decompose_samples`: redundancy, unique information and synergy of two parts, from a table or from samples;
- :func:`worth`: what plugins tell about θ, in nats and bits, alone, together and beside others;
- :func:`interactions`: redundancy, unique information and synergy of the plugins of a registry, two by two;
- :func:`inspect`: worth, interactions, dependence and certificates of a registry together;
- :func:`mutual_information`: of samples, by classical estimators, with an error bar and a verdict.
"""

from engine.information.decomposition import Decomposition
from engine.information.dependence import Dependence, PairTest, dependence
from engine.information.design import Design, design
from engine.information.discrete import decompose
from engine.information.forecast import Forecast, Outlook, forecast
from engine.information.inspection import Inspection, inspect
from engine.information.interactions import Carried, Interactions, interactions, interactions_of
from engine.information.mutual import Information, mutual_information
from engine.information.transport import decompose_samples
from engine.information.worth import Worth, Worths, worth, worth_of

__all__ = [
    "Carried",
    "Decomposition",
    "Dependence",
    "Design",
    "Forecast",
    "Information",
    "Inspection",
    "Interactions",
    "Outlook",
    "PairTest",
    "Worth",
    "Worths",
    "decompose",
    "decompose_samples",
    "dependence",
    "design",
    "forecast",
    "inspect",
    "interactions",
    "interactions_of",
    "mutual_information",
    "worth",
    "worth_of",
]
