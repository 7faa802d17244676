"""Runs compared with each other and with the paper: the command ``study`` and the files in ``studies/``.

Belongs here: the definition, running and results of a comparison.
Read first: `definition.py`.
"""
