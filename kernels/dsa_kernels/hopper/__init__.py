"""Variants for Hopper (compute capability 9.0), written in Gluon: same names and contracts as in the package above."""
