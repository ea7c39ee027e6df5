"""Servers of another release than the system's, unpacked beside it; the system stays as it is.

For `make test-matrix`, and for servers of which tests need one exact kind. What was fetched once stays in the cache.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.services.install import apt_get, jars, locked, programs_folder, require_permission, root_on_debian, run
from tests.services.service import Unavailable

MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
FOLDERS = ("bin", "sbin", "lib", "lib64")  # in a root of today each is a link to the one below usr


@dataclass(frozen=True)
class Unpacked:
    """The root folder of unpacked Debian packages."""

    root: Path

    def command(self, program: str) -> list[str]:
        """What runs `program` (a path below the root) with the loader and libraries that came with it."""
        libraries = next(self.root.glob("usr/lib/*-linux-gnu*"))
        loader = next(self.root.glob("usr/lib*/ld-linux-*.so.*"))
        return [str(loader), "--library-path", str(libraries), str(self.root / program)]


def debian_unpacked(suite: str, package: str, *, purpose: str) -> Unpacked:
    """The package of that Debian release with all it depends on, in the version that the release now has.

    Raise Unavailable, with what apt-get says, where that is forbidden or impossible, or where the release no
    longer has the package: sid moves, and keeps no old versions.
    """

    def fetch(part: Path) -> None:
        if not root_on_debian():
            raise Unavailable("only root on Debian or Ubuntu fetches it by itself")
        root = part / "root"
        for name in FOLDERS:
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for archive in _download(part, suite, package):
            # tar, since an archive's path may lead through a link that another archive brought.
            extract = f"dpkg-deb --fsys-tarfile '{archive}' | tar -x --keep-directory-symlink -C '{root}'"
            run(["bash", "-o", "pipefail", "-c", f"{extract} --exclude ./usr/share/doc --exclude ./usr/share/man"])
        shutil.rmtree(part / "apt")

    return Unpacked(_kept(f"{suite}-{package}", fetch, f"{package} of Debian {suite}", purpose) / "root")


def jar_unpacked(group: str, artifact: str, version: str, *, purpose: str) -> Path:
    """The folder with what a jar of Maven Central holds: the files in the one archive in it."""
    coordinates = f"<groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version>"
    pom = (
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
        "<groupId>dev</groupId><artifactId>fetch</artifactId><version>1</version><packaging>pom</packaging>"
        f"<dependencies><dependency>{coordinates}</dependency></dependencies></project>"
    )

    def fetch(part: Path) -> None:
        jar = next(jars(f"{artifact}-{version}", pom).glob("*.jar"))
        with zipfile.ZipFile(jar) as outer:
            inner = next(name for name in outer.namelist() if name.endswith(".txz"))
            with outer.open(inner) as packed, tarfile.open(fileobj=packed, mode="r:xz") as archive:
                archive.extractall(part / "root", filter="tar")

    return _kept(f"{artifact}-{version}", fetch, f"{artifact} {version} of Maven Central", purpose) / "root"


def _kept(name: str, fetch: Callable[[Path], None], what: str, purpose: str) -> Path:
    """The folder of that name in the cache, filled by `fetch` if it is not there."""
    folder = programs_folder() / name
    if folder.is_dir():
        return folder
    require_permission(f"{purpose} is missing ({what} is not in {programs_folder()})")
    with locked(f"{name}.lock"):
        if folder.is_dir():  # another run fetched it while we waited for the lock
            return folder
        print(f"fetching {what} into {folder}, for {purpose}", file=sys.stderr)
        part = Path(tempfile.mkdtemp(prefix=f"{name}-", suffix=".part", dir=programs_folder()))
        try:
            fetch(part)
            part.chmod(0o755)
            part.rename(folder)  # only what is whole gets the name
        except Unavailable as reason:
            raise Unavailable(f"{what} cannot be had, and {purpose} with it: {reason}") from reason
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _download(part: Path, suite: str, package: str) -> list[Path]:
    """Have apt fetch the package and all it depends on, with lists and a status of their own: nothing is installed."""
    apt = part / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} {suite} main\n")
    ours = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferences": "-",
        "Dir::Etc::preferencesparts": "-",
        "APT::Sandbox::User": "root",  # who may write here
    }
    options = [word for name, value in ours.items() for word in ("-o", f"{name}={value}")]
    apt_get(*options, "-qq", "update")
    apt_get(*options, "-qq", "-y", "--no-install-recommends", "--download-only", "install", package)
    return sorted((apt / "cache" / "archives").glob("*.deb"))


def _mirror() -> str:
    """The mirror that this machine uses for Debian; the one for everybody on another system."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for file in files:
        if file.is_file():
            found = re.search(r"^(?:URIs:|deb)\s.*?(https?://\S+/debian)/?(?:\s|$)", file.read_text(), re.MULTILINE)
            if found:
                return found[1]
    return MIRROR
