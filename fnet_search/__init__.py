"""fnet-search: factorize a CNN layer by layer under a MAC budget and a quint8 accuracy floor.

Importing the package loads nothing heavy; import what you need from its modules.
"""

__version__ = "0.1.0"
