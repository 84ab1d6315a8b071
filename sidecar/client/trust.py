"""Trust for intercepted connections: the system's roots, and the sidecar's CA beside them."""

import os
import shutil
import ssl
import tempfile
import weakref
from pathlib import Path


def ssl_context(ca_pem: str) -> ssl.SSLContext:
    """For httpx (`verify=`), aiohttp (`ssl=`) and urllib (`context=`)."""
    context = ssl.create_default_context()
    context.load_verify_locations(cadata=ca_pem)
    return context


def write_bundle(directory: Path, ca_pem: str) -> Path:
    """`bundle.pem` with both, for what takes a file (`requests`' `verify`); also `ca.pem`, the CA alone, for runtimes that add.

    Certificates are public; the directory is the caller's to remove.
    """
    system = (
        os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    )
    try:
        roots = Path(system).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        roots = ""
    (directory / "ca.pem").write_text(ca_pem)
    bundle = directory / "bundle.pem"
    bundle.write_text(roots.rstrip() + "\n" + ca_pem)
    return bundle


class OwnBundle:
    """`write_bundle` in a directory of its own, for whoever has none: it goes with its owner, and not with a forked child's."""

    def __init__(self, ca_pem: str) -> None:
        directory = tempfile.mkdtemp(prefix="spanlock-ca-")
        self.remove = weakref.finalize(self, _remove, directory, os.getpid())
        self.path = write_bundle(Path(directory), ca_pem)


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
