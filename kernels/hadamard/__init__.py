"""The orthonormal Hadamard transform of any width, with random signs: the reference in plain torch.

A transform of width n is x → (x ∘ signs) M with M = blockdiag(P ⊗ S) / √block: S a Sylvester matrix (a power of two,
by butterflies), P a Paley matrix (built from quadratic residues, multiplied densely). `hadamard_plan` says which.
"""

from __future__ import annotations

from qtool.kernels.hadamard.plan import HadamardPlan, hadamard_plan
from qtool.kernels.hadamard.reference import apply, dense, invert
from qtool.kernels.hadamard.signs import random_signs

__all__ = ["HadamardPlan", "apply", "dense", "hadamard_plan", "invert", "random_signs"]
