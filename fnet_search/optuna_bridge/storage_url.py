"""What a request says of a storage: its URL, and how long a lease lasts. No Optuna, which takes a second to import."""

import re

LEASE_SECONDS = 120.0
"""A lease that rests for so long has lost its worker; longer than a minute without a network."""


def masked(url: str) -> str:
    """A storage URL without its password, for people and files."""
    hidden = re.sub(r"(?<=://)([^:/@]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)((?:password|passwd)=)[^&]*", r"\1***", hidden)
