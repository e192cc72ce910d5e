"""Polynomials whose unknowns are values of a graph, just large enough for the statistics of a vector."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

Atom = Hashable
"""An unknown."""

Monomial = frozenset[tuple[Atom, int]]
"""A product of powers of unknowns. Exponents may be negative."""


@dataclass(frozen=True)
class Polynomial:
    """Σ coefficient · monomial."""

    terms: Mapping[Monomial, float]

    @staticmethod
    def of(atom: Atom, exponent: int = 1) -> Polynomial:
        """Return an unknown, or a power of it."""
        return Polynomial({frozenset({(atom, exponent)}): 1.0})

    @staticmethod
    def number(value: float) -> Polynomial:
        """Return a constant."""
        return Polynomial({frozenset(): float(value)} if value else {})

    def __add__(self, other: Polynomial) -> Polynomial:
        """Return the sum. Terms that cancel but for rounding are left out."""
        terms = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            before = terms.pop(monomial, 0.0)
            if not cancel(before, coefficient):
                terms[monomial] = before + coefficient
        return Polynomial(terms)

    def __mul__(self, other: Polynomial) -> Polynomial:
        """Return the product."""
        return total(Polynomial({_product(a, b): x * y}) for a, x in self.terms.items() for b, y in other.terms.items())

    def scaled(self, factor: float) -> Polynomial:
        """Return a multiple."""
        return Polynomial({m: factor * c for m, c in self.terms.items()} if factor else {})

    def inverse(self) -> Polynomial | None:
        """Return 1/p where it is a polynomial in unknowns and their inverses, None where it is none."""
        if len(self.terms) != 1:
            return None
        ((monomial, coefficient),) = self.terms.items()
        return Polynomial({frozenset((a, -e) for a, e in monomial): 1 / coefficient})

    def has(self, atom: Atom) -> bool:
        """Return whether the unknown is in it."""
        return any(a == atom for monomial in self.terms for a, _ in monomial)

    def by_power(self, atom: Atom) -> dict[int, Polynomial]:
        """Return the coefficients of the powers of an unknown, each a polynomial in the others."""
        found: dict[int, Polynomial] = {}
        for monomial, coefficient in self.terms.items():
            rest = frozenset((a, e) for a, e in monomial if a != atom)
            power = sum(e for a, e in monomial if a == atom)
            found[power] = found.get(power, Polynomial({})) + Polynomial({rest: coefficient})
        return found


def cancel(a: float, b: float) -> bool:
    """Return whether a + b is 0 but for rounding: 49 · (1/49) − 1 is, where 1/49 is a number in the graph."""
    return abs(a + b) <= 1e-12 * (abs(a) + abs(b))


def total(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Return the sum of polynomials."""
    return reduce(add, polynomials, Polynomial({}))


def _product(a: Monomial, b: Monomial) -> Monomial:
    exponents = dict(a)
    for atom, exponent in b:
        exponents[atom] = exponents.get(atom, 0) + exponent
    return frozenset((atom, e) for atom, e in exponents.items() if e)
