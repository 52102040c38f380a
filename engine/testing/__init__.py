"""The battery that a modality passes before it is summed; shipped, so that a plugin's author runs the same one."""

from engine.testing.battery import check_modality
from engine.testing.report import Check, Report

__all__ = ["Check", "Report", "check_modality"]
