"""The header scan against Python's tarfile."""

import io
import tarfile

import pytest

from data_pipeline.errors import UserError
from data_pipeline.tar_scan import MAX_MEMBER_BYTES, scan_stretch, scan_tar


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


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_real_tools_write_is_understood(tmp_path, form):
    """Long names, names beyond ASCII, times with fractions, directories: offsets and names are tarfile's."""
    directory = tarfile.TarInfo("d")
    directory.type = tarfile.DIRTYPE
    names = ["d/" + "long" * 60 + ".jpg", "d/short.txt", "ü" * 80 + ".json", "d/last"]
    members = [plain(name, name.encode() * 9) for name in names]
    members[1][0].mtime = 1.5
    path = write_tar(tmp_path / "a.tar", [(directory, b""), *members], form)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar if m.isfile()]
    found = list(scan_tar(path))
    assert [(member.name, member.header, member.data, member.size) for member in found] == expected
    assert [member.name for member in found] == names
    first, last = found[0].header, found[2].end
    again = list(scan_stretch(path.read_bytes()[first:last]))
    assert [(m.name, m.data + first, m.size) for m in again] == [(m.name, m.data, m.size) for m in found[:3]]


def test_sizes_in_pax_headers_count(tmp_path):
    member, content = plain("a.bin", b"x" * 700)
    member.pax_headers = {"size": "700", "comment": "kept out"}
    path = write_tar(tmp_path / "a.tar", [(member, content), plain("b", b"y")], tarfile.PAX_FORMAT)
    assert [(m.name, m.size) for m in scan_tar(path)] == [("a.bin", 700), ("b", 1)]


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.jpg", "a/../../up.jpg"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", [plain("fine.jpg", b"x"), plain(name, b"x")])
    with pytest.raises(UserError, match=rf"a\.tar: damaged tar, member '{name}' .*leads out"):
        list(scan_tar(path))


def test_a_global_header_may_comment_but_not_rename(tmp_path):
    for headers, is_fine in (({"comment": "hello"}, True), ({"path": "evil.jpg"}, False)):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
            tar.addfile(*[part if n == 0 else io.BytesIO(part) for n, part in enumerate(plain("a.jpg", b"x"))])
        if is_fine:
            assert [member.name for member in scan_tar(path)] == ["a.jpg"]
        else:
            with pytest.raises(UserError, match="global header .* renames"):
                list(scan_tar(path))


def test_huge_and_sparse_members_are_refused(tmp_path):
    member = tarfile.TarInfo("big.jpg")
    member.size = MAX_MEMBER_BYTES + 1
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(UserError, match=r"member 'big\.jpg' has 4294967296 bytes"):
        list(scan_tar(tmp_path / "a.tar"))
    member.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(UserError, match=r"member 'big\.jpg' has 1099511627776 bytes"):
        list(scan_tar(tmp_path / "a.tar"))
    sparse, content = plain("s.bin", b"x")
    sparse.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(UserError, match="sparse"):
        list(scan_tar(write_tar(tmp_path / "a.tar", [(sparse, content)], tarfile.PAX_FORMAT)))


@pytest.mark.parametrize("cut", [512 + 100, 1024, 1024 + 200])
def test_a_long_name_without_its_member_is_damage(tmp_path, cut):
    path = write_tar(tmp_path / "a.tar", [plain("n" * 300, b"x")], tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.tar: damaged tar, the tar ends"):
        list(scan_tar(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
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
