"""The parts of an index become columns: whole, equal to numpy's own files, with one part in memory at a time."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare.join import join_parts
from data_pipeline.prepare.shard import npy_bytes

COLUMNS = {"off": "<u8", "ntok": "<i4", "uid": "<u8"}
ROW = np.dtype([("off", "<u8"), ("ntok", "<i4"), ("uid", "<u8", (2,))])


def write_parts(folder, sizes):
    random = np.random.default_rng(0)
    (folder / "index").mkdir()
    parts, paths = [], []
    for number, size in enumerate(sizes):
        rows = np.zeros(size, ROW)
        rows["off"] = random.integers(0, 1 << 40, size)
        rows["ntok"] = random.integers(0, 1 << 20, size)
        rows["uid"] = random.integers(0, 1 << 62, (size, 2))
        paths.append(folder / f"{number}.npy")
        paths[-1].write_bytes(npy_bytes(rows))
        parts.append(rows)
    return paths, parts


@pytest.mark.parametrize("sizes", [[5], [3, 1, 4]])
def test_columns_are_the_files_numpy_would_write(tmp_path, sizes):
    paths, parts = write_parts(tmp_path, sizes)
    joined = join_parts(paths, sizes, tmp_path / "index", COLUMNS, ("ntok",))
    table = np.concatenate(parts)
    expected = {name: npy_bytes(table[name]) for name in COLUMNS}
    expected["ptr"] = npy_bytes(np.cumsum([0, *sizes]).astype("<i8"))
    assert {path.name for path in (tmp_path / "index").iterdir()} == {f"{name}.npy" for name in expected}
    for name, content in expected.items():
        assert (tmp_path / "index" / f"{name}.npy").read_bytes() == content
        assert joined.sha256[f"{name}.npy"] == hashlib.sha256(content).hexdigest()
    assert joined.totals == {"ntok": int(table["ntok"].sum(dtype=np.int64))}


def test_memory_is_that_of_one_part(tmp_path):
    sizes = [10_000] * 30
    paths, _ = write_parts(tmp_path, sizes)
    tracemalloc.start()
    join_parts(paths, sizes, tmp_path / "index", COLUMNS, ("ntok",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * ROW.itemsize * sizes[0]


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_part_that_does_not_fit_leaves_nothing_behind(tmp_path, damage):
    paths, parts = write_parts(tmp_path, [3, 4])
    if damage == "gone":
        paths[1].unlink()
    else:
        paths[1].write_bytes(npy_bytes(parts[1][:2]))
    with pytest.raises((FileNotFoundError, UserError), match=r"1\.npy"):
        join_parts(paths, [3, 4], tmp_path / "index", COLUMNS, ())
    assert not list((tmp_path / "index").iterdir())
