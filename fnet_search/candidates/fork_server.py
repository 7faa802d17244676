"""Imported by the fork server: everything that a worker would import, once for all of them."""

import fnet_search.candidates.workers  # noqa: F401
from fnet_search.training.kernels import import_compiler

import_compiler()
