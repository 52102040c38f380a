"""Fitting a modality's scalar from simulations or labelled pairs."""

from engine.learning.learnable import Learnable

__all__ = ["Learnable"]
