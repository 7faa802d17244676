"""Storages that stand for those on other machines."""

from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage

from fnet_search.optuna_bridge.storage import open_url


def opened_as(storage: Any, monkeypatch: pytest.MonkeyPatch) -> BaseStorage:
    """What `open_url` makes of a storage that is reached over a network, if this is what Optuna finds there."""
    with monkeypatch.context() as patched:
        patched.setattr(optuna.storages, "get_storage", lambda url: storage)
        return open_url("sqlite:///:memory:")
