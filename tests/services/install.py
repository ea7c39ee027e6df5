"""Installs what a local server needs: Debian's packages, and jars from Maven Central.

This happens by itself only as root on Debian or Ubuntu, says on stderr what it installs, and never where
OUTBOX_TEST_INSTALL=0 forbids it. OUTBOX_TEST_INSTALL=1 lets another user or system fetch what needs no
root (jars, into the cache folder).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tests.services.service import Unavailable

PERMISSION = "OUTBOX_TEST_INSTALL"
OUTPUT_TAIL = 2_000  # characters of an installer's output in an error message

# A fresh install of PostgreSQL's package would also create and start a cluster on port 5432.
CREATECLUSTER = Path("/etc/postgresql-common/createcluster.d/pyoutbox-tests.conf")
POLICY = Path("/usr/sbin/policy-rc.d")


def cache_folder() -> Path:
    """Where downloads are kept between runs, one folder per user."""
    return _made(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def programs_folder() -> Path:
    """The same for programs, which another user runs where we are root: to him, root's own folder is closed."""
    if os.geteuid() == 0 and not os.environ.get("XDG_CACHE_HOME"):
        return _made("/var/cache")
    return cache_folder()


def _made(base: str) -> Path:
    folder = Path(base).expanduser() / "pyoutbox-services"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def debian_packages(packages: Sequence[str], *, purpose: str) -> None:
    """Install Debian packages; raise Unavailable where that is forbidden, impossible or fails."""
    wanted = " ".join(packages)
    require_permission(f"{purpose} is not installed (Debian: apt install {wanted})")
    if not root_on_debian():
        raise Unavailable(f"{purpose} is not installed, and only root on Debian or Ubuntu installs it ({wanted})")
    with locked():
        print(f"installing {wanted} with apt-get, for {purpose}", file=sys.stderr)
        _update_package_lists()
        with _no_cluster_created(), _no_service_started():
            apt_get("install", "-y", "--no-install-recommends", *packages)


def package_exists(package: str) -> bool:
    """Whether Debian's lists, brought up to date first, have the package. For the same callers as above."""
    if not root_on_debian() or os.environ.get(PERMISSION) == "0":
        return False
    with locked():
        _update_package_lists()
    result = subprocess.run(["apt-cache", "show", package], capture_output=True)
    return result.returncode == 0


def jars(name: str, pom: str) -> Path:
    """The folder with the jars that a Maven pom depends on, from the cache or else Maven Central.

    `name` holds the versions: the same name is the same jars. Raise Unavailable if they are not there and
    may not or cannot be fetched.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    if os.environ.get(PERMISSION) != "1" and not root_on_debian():
        raise Unavailable(
            f"{name} is not in {cache_folder()}, and only root on Debian or Ubuntu fetches it by itself "
            f"(set {PERMISSION}=1 to have Maven fetch it)"
        )
    require_permission(f"{name} is not in {cache_folder()}")
    if shutil.which("mvn") is None:
        debian_packages(["maven"], purpose="Maven")
    with locked():
        if folder.is_dir():  # another run fetched it while we waited for the lock
            return folder
        print(f"fetching {name} from Maven Central into {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", suffix=".part", dir=cache_folder()) as part:
            (Path(part) / "pom.xml").write_text(pom)
            run(["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=libs"], cwd=Path(part))
            # Only a whole download gets the name.
            (Path(part) / "libs").rename(folder)
    return folder


def java(minimum: int) -> str:
    """The path of a Java runtime of at least that version, installed if need be; raise Unavailable without."""
    if found := _java(minimum):
        return found
    debian_packages(["default-jre-headless"], purpose=f"Java {minimum} or newer")
    if found := _java(minimum):
        return found
    raise Unavailable(f"no Java {minimum} or newer: this system's default-jre-headless is older")


def _java(minimum: int) -> str | None:
    candidates = [shutil.which("java")]
    if home := os.environ.get("JAVA_HOME"):
        candidates.insert(0, str(Path(home) / "bin" / "java"))
    for candidate in candidates:
        if candidate is None:
            continue
        with contextlib.suppress(OSError):
            result = subprocess.run([candidate, "-version"], capture_output=True, text=True)
            version = re.search(r'version "(\d+)', result.stderr)
            if version and int(version[1]) >= minimum:
                return candidate
    return None


def require_permission(missing: str) -> None:
    """Raise Unavailable where installing is forbidden; `missing` says what for."""
    if os.environ.get(PERMISSION) == "0":
        raise Unavailable(f"{missing}, and {PERMISSION}=0 forbids installing it")


def root_on_debian() -> bool:
    """Whether apt-get may be used: as root, on Debian or one of its children."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    try:
        release = Path("/etc/os-release").read_text()
    except OSError:
        return False
    return re.search(r"^ID(_LIKE)?=.*\b(debian|ubuntu)\b", release, re.MULTILINE) is not None


@contextlib.contextmanager
def locked(name: str = "lock") -> Iterator[None]:
    """One installer at a time, for all runs of this user; the kernel frees the lock of a killed one."""
    with (cache_folder() / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_cluster_created() -> Iterator[None]:
    """Keep PostgreSQL's package from creating a cluster, unless an administrator has decided about that."""
    if CREATECLUSTER.parent.parent.exists():
        yield
        return
    CREATECLUSTER.parent.mkdir(parents=True)
    CREATECLUSTER.write_text("create_main_cluster = false\n")
    try:
        yield
    finally:
        CREATECLUSTER.unlink()


@contextlib.contextmanager
def _no_service_started() -> Iterator[None]:
    """Keep packages from starting their servers on their usual ports (Debian policy, 9.3.3)."""
    if POLICY.exists():  # an administrator's, or a container image's
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


@cache
def _update_package_lists() -> None:
    apt_get("update", "-qq")


def apt_get(*arguments: str) -> None:
    """Run apt-get; raise Unavailable with what it said if it fails."""
    # Another apt at work, such as unattended upgrades, is waited for.
    run(["apt-get", "-o", "DPkg::Lock::Timeout=300", *arguments], env={"DEBIAN_FRONTEND": "noninteractive"})


def run(command: Sequence[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    """Run an installing command to its end; raise Unavailable with what it said if it fails."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.returncode:
        raise Unavailable(f"`{' '.join(command)}` failed:\n{result.stdout[-OUTPUT_TAIL:]}")
