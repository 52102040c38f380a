"""Refined evidence: learned scalars turned into calibrated concave ones around an estimate."""

from engine.refinement.refine import Refinement
from engine.refinement.scalar import RefinedScalar

__all__ = ["RefinedScalar", "Refinement"]
