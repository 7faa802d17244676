"""The version of the package. Run folders and files record it; workers that share a study must agree on it."""

__version__ = "0.1.0"
