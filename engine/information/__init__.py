"""Information as a quantity of its own: what more data would tell, what to measure next, which parts depend on each other.

- :func:`forecast`: the errors to be expected after more data, also of kinds that nobody has taken yet;
- :func:`design`: the numbers of observations that make an error least within a budget;
- :func:`dependence`: whether plugins are independent given θ, and the honest error bar where they are not.
"""

from engine.information.dependence import Dependence, PairTest, dependence
from engine.information.design import Design, design
from engine.information.forecast import Forecast, Outlook, forecast

__all__ = ["Dependence", "Design", "Forecast", "Outlook", "PairTest", "dependence", "design", "forecast"]
