"""Headers of .npy: what numpy writes is read, what is damaged is a ValueError and nothing else."""

import io

import numpy as np
import pytest

from data_pipeline.npy import array_of, open_npy, parse_npy_header


def npy(array, version=(1, 0)):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version, allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 2), (2, 0, 5)])
@pytest.mark.parametrize("dtype", ["<u8", "|u1", "<i4", "<f4", "|b1"])
def test_headers_that_numpy_writes(tmp_path, version, shape, dtype):
    array = np.ones(shape, dtype)
    content = npy(array, version)
    header = parse_npy_header(content)
    assert (header.dtype.str, header.shape, header.num_bytes) == (dtype, shape, len(content))
    (tmp_path / "a.npy").write_bytes(content)
    for found in (open_npy(tmp_path / "a.npy"), array_of(content)):
        assert found.dtype == array.dtype and found.shape == shape and (found == array).all()
        assert not found.flags.writeable or not found.size


def test_sizes_objects_and_records_are_refused(tmp_path):
    whole = npy(np.arange(5))
    for content in (whole[:-1], whole + b"\0", whole[:40], b"", b"\x93NUMPY", npy(np.array([{}], object))):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(ValueError):
            open_npy(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="does not read"):
        parse_npy_header(npy(np.zeros(2, [("a", "<u4"), ("b", "<u8")])))


def test_every_damaged_header_is_read_or_refused():
    whole = npy(np.arange(12, dtype="<u8").reshape(4, 3))
    random = np.random.default_rng(0)
    for _ in range(3000):
        content = bytearray(whole)
        for place in random.integers(0, 128, random.integers(1, 4)):
            content[place] = int(random.integers(0, 256))
        try:
            array = array_of(bytes(content))
        except ValueError:
            continue
        assert array.nbytes == 96
