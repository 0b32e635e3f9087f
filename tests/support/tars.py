"""Tars made by hand."""

import io
import tarfile


def tar_of(*members, form=tarfile.USTAR_FORMAT) -> bytes:
    """A tar of (name, content), or of (name, type letter, link) for what has no content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if len(rest) == 2:
                info.type, info.linkname = rest[0].encode(), rest[1]
                tar.addfile(info)
            else:
                info.size = len(rest[0])
                tar.addfile(info, io.BytesIO(rest[0]))
    return stream.getvalue()
