"""Tables p(x1, x2, y) whose decompositions are known, in bits."""

import numpy as np

BITS = [(a, b) for a in (0, 1) for b in (0, 1)]

# R, U1, U2, S, I(X1; X2 | Y). Where exchanging X1 and X2 changes nothing, U vanishes and R = I(X1; Y), S = I(X1, X2; Y) − R; a part
# that tells nothing shares nothing (rows 4 and 11); Y = (X1, X2) leaves one law alone in Δ.
TRUTHS = {
    "AND": (0.3113, 0.0, 0.0, 0.5, 0.1887),
    "OR": (0.3113, 0.0, 0.0, 0.5, 0.1887),
    "XOR": (0.0, 0.0, 0.0, 1.0, 1.0),
    "Y = X1": (0.0, 1.0, 0.0, 0.0, 0.0),
    "Y = (X1, X2)": (0.0, 1.0, 1.0, 0.0, 0.0),
    "redundant": (1.0, 0.0, 0.0, 0.0, 0.0),
    "SUM": (0.5, 0.0, 0.0, 1.0, 0.5),
    "RDNXOR": (1.0, 0.0, 0.0, 1.0, 1.0),
    "XOR, 10 % flip": (0.0, 0.0, 0.0, 0.5310, 0.5310),
    "AND, 10 % flip": (0.1468, 0.0, 0.0, 0.2655, 0.1187),
    "X1 = (a, b), X2 = b, Y = a ⊕ b": (0.0, 1.0, 0.0, 0.0, 1.0),
    "independent copies, 10 % flip": (0.5310, 0.0, 0.0, 0.2111, 0.0),
}


def _table(rows):
    p = np.zeros([max(row[k] for row in rows) + 1 for k in range(3)])
    for a, b, y, weight in rows:
        p[a, b, y] += weight
    return p


def _of(function):
    return _table([(a, b, function(a, b), 0.25) for a, b in BITS])


def _flipped(function):
    return _table([(a, b, y, 0.225 if y == function(a, b) else 0.025) for a, b in BITS for y in (0, 1)])


TABLES = {
    "AND": _of(lambda a, b: a & b),
    "OR": _of(lambda a, b: a | b),
    "XOR": _of(lambda a, b: a ^ b),
    "Y = X1": _of(lambda a, b: a),
    "Y = (X1, X2)": _of(lambda a, b: 2 * a + b),
    "redundant": _table([(a, a, a, 0.5) for a in (0, 1)]),
    "SUM": _of(lambda a, b: a + b),
    "RDNXOR": _table([(2 * c + a, 2 * c + b, 2 * c + (a ^ b), 0.125) for a, b in BITS for c in (0, 1)]),
    "XOR, 10 % flip": _flipped(lambda a, b: a ^ b),
    "AND, 10 % flip": _flipped(lambda a, b: a & b),
    "X1 = (a, b), X2 = b, Y = a ⊕ b": _table([(2 * a + b, b, a ^ b, 0.25) for a, b in BITS]),
    "independent copies, 10 % flip": _table(
        [(a, b, y, 0.5 * (0.9 if a == y else 0.1) * (0.9 if b == y else 0.1)) for a, b in BITS for y in (0, 1)]
    ),
}
