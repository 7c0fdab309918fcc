import ctypes
import sys
from types import SimpleNamespace

import pytest

from depthprune import memory


def test_tells_glibc_to_keep_freed_memory(monkeypatch):
    told = {}
    library = SimpleNamespace(mallopt=lambda parameter, value: told.update({parameter: value}))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    memory.keep_freed_memory()
    assert told == {-1: 1 << 30, -3: 1 << 30}  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h


def test_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("no C library is opened"))
    memory.keep_freed_memory()


@pytest.mark.parametrize("failure", [OSError("no libc.so.6"), AttributeError("no mallopt")])
def test_does_without_glibc(monkeypatch, failure):
    def fail(name: str) -> None:
        raise failure

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", fail)
    memory.keep_freed_memory()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_the_real_library_takes_it():
    memory.keep_freed_memory()
