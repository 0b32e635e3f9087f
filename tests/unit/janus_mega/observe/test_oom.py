"""An out-of-memory error passes on with what to change; other errors and results pass as they are."""

import pytest
import torch

from janus_mega.observe.oom import REMEDY, memory_snapshot_on_failure


def test_out_of_memory_is_raised_again_with_a_remedy(tmp_path):
    with (
        pytest.raises(torch.OutOfMemoryError, match="tried") as caught,
        memory_snapshot_on_failure(tmp_path, 0, history=True),
    ):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")
    assert caught.value.__notes__[0] == REMEDY


def test_other_errors_pass_untouched(tmp_path):
    with pytest.raises(ValueError) as caught, memory_snapshot_on_failure(tmp_path, 0, history=False):
        raise ValueError("no")
    assert not hasattr(caught.value, "__notes__")
