"""The version of the package: recorded in run folders and files, compared by workers that share a study."""

__version__ = "0.1.0"
