"""The kernel's wait, that doorbells stand on; doorbells between ranks are in test_mpi."""

from __future__ import annotations

import ctypes
import platform
import threading
import time

import pytest

from ps_elastic.transport import waking
from ps_elastic.transport import waking as kernel
from ps_elastic.transport.waking import WAIT, WAKE, Time, find_futex


@pytest.mark.parametrize("machine", ["sparc", "", "alpha"])
def test_there_is_no_futex_on_a_machine_whose_number_for_it_is_unknown(monkeypatch, machine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert find_futex() is None


def test_there_is_no_futex_elsewhere_than_on_linux(monkeypatch):
    monkeypatch.setattr(kernel.sys, "platform", "darwin")
    assert find_futex() is None


def test_there_is_no_futex_where_the_kernel_refuses_it(monkeypatch):
    monkeypatch.setitem(waking._NUMBERS, platform.machine().lower(), 100_000)  # no such call
    assert find_futex() is None


def test_a_wait_ends_by_a_wake_by_its_timeout_and_at_once_where_the_word_has_changed():
    futex = find_futex()
    if futex is None:
        pytest.skip(f"no futex on {platform.system()} {platform.machine()}")
    word = ctypes.c_int32(1)
    address = ctypes.addressof(word)

    def waited(value: int, timeout_s: int, ns: int = 0) -> float:
        started = time.monotonic()
        futex(address, WAIT, value, Time(timeout_s, ns))
        return time.monotonic() - started

    assert waited(0, 20) < 10  # the word is 1
    assert 0.05 <= waited(1, 0, 50_000_000) < 10

    def wake() -> None:
        while futex(address, WAKE, 1) == 0:  # nobody waits yet
            time.sleep(0.01)

    waker = threading.Thread(target=wake)
    waker.start()
    assert waited(1, 20) < 10
    waker.join()
