"""Refined evidence: learned scalars turned into calibrated concave ones around an estimate."""

from engine.refinement.refine import Refined, Refinement, laws_of, refine
from engine.refinement.scalar import RefinedScalar

__all__ = ["Refined", "RefinedScalar", "Refinement", "laws_of", "refine"]
