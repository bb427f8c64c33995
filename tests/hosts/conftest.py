"""Tiny hosts that tests of one run share."""

from typing import Any

import pytest
import tiny_hosts
import torch


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of hosts, written once each."""
    written: dict[str, str] = {}

    def folder(family: str) -> str:
        tiny_hosts.require(family)
        if family not in written:
            written[family] = tiny_hosts.write(family, tmp_path_factory.mktemp("hosts") / family)
        return written[family]

    return folder


@pytest.fixture(scope="session")
def adopted(folders: Any) -> Any:
    """Models on hosts, made once each; nothing changes them."""
    made: dict[tuple[str, str], Any] = {}

    def of(family: str, dtype: str = "float32") -> tuple[Any, Any, Any]:
        if (family, dtype) not in made:
            folder = folders(family)
            host = tiny_hosts.load(folder, family, getattr(torch, dtype))
            made[family, dtype] = (*tiny_hosts.adopted(folder, family, dtype=dtype), host)
        return made[family, dtype]

    return of
