"""Certificates for brokers that are tested with TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def certificates(folder: Path, client: str | None = None) -> None:
    """ca.pem signs broker.pem, for localhost, and client.pem, where a ``client`` is named; other.pem is an authority that
    signs neither. Each has its .key beside it."""
    new_key = ("-newkey", "rsa:2048", "-nodes")
    for name in ("ca", "other"):
        openssl(
            folder,
            *("req", "-x509", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.pem"),
            *("-days", "30", "-subj", "/CN=test"),
        )
    (folder / "names").write_text("subjectAltName=DNS:localhost")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30", "-extfile", "names")
    for name, subject in (("broker", "localhost"), ("client", client)):
        if subject is not None:
            openssl(folder, "req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={subject}")
            openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
