"""The process tree is found and its memory is seen."""

import os
import subprocess
import sys
import time

import pytest

from janus_mega.observe.memory import PeakMemory, cuda_peak_bytes, process_tree, pss_bytes, tree_pss_bytes

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's smaps_rollup")


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_children_belong_to_the_tree_and_to_the_peak():
    before = tree_pss_bytes(os.getpid())
    hold = "import sys; block = bytearray(b'x') * (64 << 20); print('ready', flush=True); sys.stdin.read()"
    with PeakMemory(interval_s=0.05) as peak:
        child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            child.stdout.readline()
            assert child.pid in process_tree(os.getpid())
            assert pss_bytes(child.pid) > 64 * MIB
            wait_until(lambda: peak.peak_bytes > before + 48 * MIB)
        finally:
            child.communicate()
    assert child.pid not in process_tree(os.getpid())


def test_a_process_that_ended_weighs_nothing():
    assert pss_bytes(2**22 + 1) == 0


def test_without_a_device_there_is_no_peak():
    import torch

    assert (cuda_peak_bytes() > 0) == (torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0)
