"""Whether a whole sum is right: the posteriors of simulated data cover, and real data look like simulated ones."""

from engine.checks.coverage import CalibrationCheck, check_calibration
from engine.checks.predictive import PredictiveCheck, check_predictions
from engine.checks.two_sample import c2st

__all__ = ["CalibrationCheck", "PredictiveCheck", "c2st", "check_calibration", "check_predictions"]
