"""The header scan against Python's tarfile."""

import io
import tarfile

import pytest

from data_pipeline.errors import UserError
from data_pipeline.tar_scan import scan_tar


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return path


def plain(name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_equal_tarfile(tmp_path, form):
    members = [plain(f"d/{n:03d}.bin", bytes([n]) * size) for n, size in enumerate([0, 1, 511, 512, 513, 5000])]
    path = write_tar(tmp_path / "a.tar", members, form)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset, member.offset_data, member.size) for member in tar]
    found = list(scan_tar(path))
    assert [(member.name, member.header, member.data, member.size) for member in found] == expected
    assert all(content[m.data : m.data + m.size] == given for m, (_, given) in zip(found, members, strict=True))


def test_long_names_use_the_prefix(tmp_path):
    name = "a" * 90 + "/" + "b" * 60
    assert [member.name for member in scan_tar(write_tar(tmp_path / "a.tar", [plain(name, b"x")]))] == [name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("evil")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match=r"a\.tar: damaged tar, member 'evil/?' .*not a plain file"):
        list(scan_tar(write_tar(tmp_path / "a.tar", [(member, b"")])))


@pytest.mark.parametrize("size", [100, 512 + 100, 2 * 512 + 200, 3 * 512])
def test_truncation_is_seen_wherever_it_falls(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", [plain("a", b"x" * 900), plain("b", b"y")])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"a\.tar: damaged tar, the tar ends"):
        list(scan_tar(path))


def test_a_wrong_checksum_is_seen(tmp_path):
    path = write_tar(tmp_path / "a.tar", [plain("a", b"x")])
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        list(scan_tar(path))
