"""Information as a quantity of its own: what more data would tell, what to measure next, which parts depend on each other.

- :func:`forecast`: the errors to be expected after more data, also of kinds that nobody has taken yet;
- :func:`design`: the numbers of observations that make an error least within a budget.
"""

from engine.information.design import Design, design
from engine.information.forecast import Forecast, Outlook, forecast

__all__ = ["Design", "Forecast", "Outlook", "design", "forecast"]
