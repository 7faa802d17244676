"""Spaces by name, and torch modules as macroarchitectures.

Comes in: everything that makes a `Macroarchitecture` of a network defined elsewhere.
Read first: `spaces.py`.
"""
