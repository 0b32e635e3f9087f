"""Environments of the peers, made on demand in the scratch directory: they never enter the project's dependencies.

A peer's environment sees the packages of the interpreter that runs the tool (one .pth line), so torch, numpy, Pillow
and webdataset are the same for everybody and no second torch is installed. What a peer needs besides is pinned here and
installed without resolving dependencies: an open range would replace torch by one with gigabytes of CUDA.
"""

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

_AWS = ("boto3==1.44.5", "botocore==1.44.5", "s3transfer==0.19.3", "jmespath==1.1.0")
_HTTP = ("requests==2.34.2", "certifi==2026.10.18", "charset-normalizer==3.5.2", "urllib3==2.8.0")
_DATES = ("python-dateutil==2.9.0.post0", "six==1.17.0")
_ENERGON = (
    "megatron-energon==7.4.1",
    "multi-storage-client==1.3.1",
    "s3fs==0.4.2",
    "xattr==1.3.0",
    "cffi==2.1.1",
    "pycparser==3.12",
    "opentelemetry-api==1.45.2",
    "lark==1.3.1",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
    "attrs==26.1.0",
    "prettytable==3.18.0",
    "wcwidth==0.9.4",
    "wcmatch==12.0.1",
    "bracex==3.2.2",
    "filetype==1.2.0",
    "deprecation==2.1.0",
    "mfusepy==3.1.1",
    "rapidyaml==0.15.2",
)
_LITDATA = ("litdata==0.2.76", "lightning-utilities==0.15.3", "obstore==0.12.1", "tifffile==2026.3.3")
_MOSAIC = (
    "mosaicml-streaming==0.13.0",
    "numpy==2.1.3",  # it pins numpy<2.2, so it has an environment of its own
    "catalogue==2.0.10",
    "brotli==1.2.1",
    "zstd==1.5.7.2",
    "python-snappy==0.7.3",
    "cramjam==2.14.0",
    "xxhash==3.8.2",
)


@dataclass(frozen=True, slots=True)
class Peer:
    """One loader that is measured besides ours."""

    system: str
    """Module below tools.bench_data.systems."""
    environment: str
    """Directory of its environment; empty for that of the tool."""


PEERS = {
    "webdataset": Peer("webdataset_tars", ""),
    "energon": Peer("energon_tars", "peers"),
    "litdata": Peer("litdata_chunks", "peers"),
    "mosaic": Peer("mosaic_shards", "mosaic"),
}
"""By the name that --peers takes. webdataset is a dependency of ours and always takes part."""

_PINS = {"peers": (*_AWS, *_HTTP, *_DATES, *_ENERGON, *_LITDATA), "mosaic": (*_AWS, *_HTTP, *_DATES, *_MOSAIC)}


def interpreter(environment: str, scratch: Path) -> Path:
    """Path of the interpreter of an environment, which is made if it is not there or holds other pins.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    if not environment:
        return Path(sys.executable)
    place = scratch / "environments" / environment
    python = place / "bin" / "python"
    stamp = place / "pins.txt"
    pins = "\n".join([sysconfig.get_paths()["purelib"], *_PINS[environment]])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == pins:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, *_PINS[environment]], check=True, stdout=subprocess.DEVNULL)
    (Path(own) / "packages_of_the_tool.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    stamp.write_text(pins, encoding="utf-8")
    return python


def environment_variables() -> dict[str, str]:
    """What a measured process sees: one thread everywhere, and the checkout on its path."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "0"}
    return {**os.environ, **threads, **quiet, "PYTHONPATH": str(ROOT)}
