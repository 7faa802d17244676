"""Runs compared with each other and with the paper: the command ``study`` and the files in ``studies/``.

Comes in: Definition, running and results of such a comparison.
Read first: `definition.py`.
"""
