"""The harness that gives tests their servers, tried on a small server of our own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.services import (
    KAFKA,
    SERVICES,
    Options,
    Server,
    Service,
    StartFailed,
    Unavailable,
    fixtures,
    install,
    unpack,
)
from tests.services.mysql import mariadb_or_its_stand_in
from tests.services.postgresql import Postgresql
from tests.services.process import LocalProcess, free_port, new_folder
from tests.services.service import Control
from tests.services.waiting import wait_until

pytest_plugins = ["pytester"]

GREETING = b"hello"
GREETER = f"""
import socket, sys
print("greeting on", sys.argv[1], flush=True)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=5)
while True:
    connection, _ = server.accept()
    with connection:
        connection.sendall({GREETING!r})
"""
BROKEN = "print('the disk is on fire', flush=True); raise SystemExit(3)"


class Greeter(Service[Server]):
    """A server that greets whoever connects; each source can be had or not."""

    name = "greeter"
    how_to_get = "plant a greeter"

    def __init__(self, *, docker: bool = False, local: bool = True, script: str = GREETER) -> None:
        self._docker = docker
        self._local = local
        self._script = script

    def ping(self, url: str) -> None:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=1) as connection:
            if connection.recv(100) != GREETING:
                raise ConnectionError("no greeting")

    def server(self, url: str, control: Control) -> Server:
        return Server(self, url, control)

    def docker(self, options: Options) -> tuple[str, Control]:
        if not self._docker:
            raise Unavailable("no engine")
        url, control = self._process(options)
        control.source = "docker"
        return url, control

    def local(self, options: Options) -> tuple[str, Control]:
        if not self._local:
            raise Unavailable("not installed")
        return self._process(options)

    def _process(self, options: Options) -> tuple[str, LocalProcess]:
        port = free_port()
        folder = new_folder(self.name, detached=options.detached)
        command = [sys.executable, "-c", self._script, str(port)]
        return f"tcp://127.0.0.1:{port}", LocalProcess(command, folder, detached=options.detached)


@pytest.fixture
def obtained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Greeter], Server]]:
    """Obtains a server and closes it after the test; no URL is set unless the test does."""
    monkeypatch.delenv("OUTBOX_TEST_GREETER_URL", raising=False)
    servers = []

    def obtain(service: Greeter) -> Server:
        servers.append(service.obtain())
        return servers[-1]

    yield obtain
    for server in servers:
        server.close()


Obtained = Callable[[Greeter], Server]


# --- Where a server comes from


def test_the_environment_comes_first(obtained: Obtained, monkeypatch: pytest.MonkeyPatch) -> None:
    running = obtained(Greeter())
    monkeypatch.setenv("OUTBOX_TEST_GREETER_URL", running.url)
    server = obtained(Greeter(docker=True))
    assert server.url == running.url
    assert not server.ours


def test_docker_comes_before_a_local_install(obtained: Obtained) -> None:
    assert obtained(Greeter(docker=True)).control.source == "docker"


def test_a_local_install_comes_last(obtained: Obtained) -> None:
    assert obtained(Greeter()).control.source == "local"


def test_without_any_source_each_says_why_not(obtained: Obtained) -> None:
    with pytest.raises(Unavailable, match="no engine; not installed"):
        obtained(Greeter(local=False))


def test_a_url_where_nothing_answers_is_an_error_and_not_passed_over(
    obtained: Obtained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_TEST_GREETER_URL", f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(StartFailed, match=r"OUTBOX_TEST_GREETER_URL is set to .* nothing answers there"):
        obtained(Greeter())


def test_a_server_given_by_its_url_is_not_ended(obtained: Obtained, monkeypatch: pytest.MonkeyPatch) -> None:
    running = obtained(Greeter())
    monkeypatch.setenv("OUTBOX_TEST_GREETER_URL", running.url)
    obtained(Greeter()).close()
    Greeter().ping(running.url)


def test_every_service_has_a_name_of_its_own() -> None:
    assert len({service.variable for service in SERVICES.values()}) == len(SERVICES)
    assert {"postgresql", "mariadb", "kafka"} <= set(SERVICES)


# --- Power over a server


def test_a_start_that_fails_shows_the_log_and_leaves_nothing(obtained: Obtained, tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match=r"greeter at .* ended while starting(.|\n)*the disk is on fire"):
        obtained(Greeter(script=BROKEN))


def test_a_killed_server_comes_back_on_its_port(obtained: Obtained) -> None:
    server = obtained(Greeter())
    server.kill()
    with pytest.raises(OSError):
        Greeter().ping(server.url)
    server.restart()
    Greeter().ping(server.url)


def test_a_stopped_server_comes_back_on_its_port(obtained: Obtained) -> None:
    server = obtained(Greeter())
    server.stop()
    with pytest.raises(OSError):
        Greeter().ping(server.url)
    server.restart()
    Greeter().ping(server.url)


def test_a_paused_server_does_not_answer_until_it_resumes(obtained: Obtained) -> None:
    server = obtained(Greeter())
    server.pause()
    with pytest.raises(TimeoutError):
        Greeter().ping(server.url)
    server.resume()
    Greeter().ping(server.url)


@pytest.mark.parametrize("harm", ["stop", "kill", "pause"])
def test_recover_undoes_what_a_test_did(obtained: Obtained, harm: str) -> None:
    server = obtained(Greeter())
    getattr(server, harm)()
    server.recover()
    Greeter().ping(server.url)


def test_a_paused_server_can_be_closed(obtained: Obtained) -> None:
    server = obtained(Greeter())
    server.pause()
    server.close()
    assert not server.control.running()


def test_closing_removes_the_data(obtained: Obtained) -> None:
    server = obtained(Greeter())
    folder = Path(server.control.state()["folder"])
    assert folder.exists()
    server.close()
    assert not folder.exists()


def test_a_detached_server_is_adopted_by_its_state() -> None:
    server = Greeter().obtain_own(Options(detached=True))
    adopted = LocalProcess.adopt(server.control.state())
    assert adopted.running()
    adopted.discard()
    assert not server.control.running()


def test_another_process_with_the_same_pid_is_not_adopted(obtained: Obtained) -> None:
    state = obtained(Greeter()).control.state()
    assert not LocalProcess.adopt(state | {"created": state["created"] - 60}).running()


def test_the_folders_of_a_killed_runner_are_swept_by_the_next() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = new_folder("greeter", detached=False)
    orphan = left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-")))
    fresh = new_folder("greeter", detached=False)
    assert fresh.exists()
    assert not orphan.exists()
    fresh.rmdir()


# --- Installing


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OUTBOX_TEST_INSTALL", raising=False)
    return tmp_path / "pyoutbox-services"


def a_command(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an executable before all others of its name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.usefixtures("empty_cache")
def test_installing_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_TEST_INSTALL", "0")
    with pytest.raises(Unavailable, match="OUTBOX_TEST_INSTALL=0 forbids"):
        install.debian_packages(["cowsay"], purpose="The cow")
    with pytest.raises(Unavailable, match=r"jars-1 is not in .*OUTBOX_TEST_INSTALL=0 forbids"):
        install.jars("jars-1", "<project/>")


def test_what_is_in_the_cache_is_used_even_so(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_TEST_INSTALL", "0")
    (empty_cache / "jars-1").mkdir(parents=True)
    assert install.jars("jars-1", "<project/>") == empty_cache / "jars-1"


def test_a_download_that_fails_leaves_nothing_in_the_cache(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_command(tmp_path / "bin", "mvn", "mkdir libs; touch libs/half.jar; echo no route to host; exit 1", monkeypatch)
    monkeypatch.setenv("OUTBOX_TEST_INSTALL", "1")
    with pytest.raises(Unavailable, match="no route to host"):
        install.jars("jars-1", "<project/>")
    assert [path.name for path in empty_cache.iterdir()] == ["lock"]


def test_two_runs_at_once_download_once(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    a_command(
        tmp_path / "bin", "mvn", f"echo called >>{calls}; sleep 0.5; mkdir libs; touch libs/whole.jar", monkeypatch
    )
    monkeypatch.setenv("OUTBOX_TEST_INSTALL", "1")
    code = "from tests.services.install import jars; print(jars('jars-1', '<project/>'))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folder = str(empty_cache / "jars-1")
    assert [run.communicate()[0].strip() for run in runs] == [folder, folder]
    assert calls.read_text() == "called\n"


def test_a_package_that_a_moving_suite_has_dropped_fails_by_name_and_leaves_nothing(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = "E: Unable to locate package mysql-server-core"
    a_command(tmp_path / "bin", "apt-get", f"case $* in *install*) echo '{refusal}'; exit 100; esac", monkeypatch)
    monkeypatch.setattr(unpack, "root_on_debian", lambda: True)
    with pytest.raises(Unavailable, match=rf"mysql-server-core of Debian sid cannot be had, and MySQL(.|\n)*{refusal}"):
        unpack.debian_unpacked("sid", "mysql-server-core", purpose="MySQL")
    assert [path.name for path in empty_cache.iterdir()] == ["sid-mysql-server-core.lock"]


def test_a_release_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no PostgreSQL 9 for tests; there are 14, 18"):
        Postgresql("9")
    with pytest.raises(ValueError, match="no oracle for tests in MariaDB's place; there are mariadb, mysql"):
        mariadb_or_its_stand_in("oracle")


def test_an_older_java_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_command(tmp_path / "bin", "java", "echo 'openjdk version \"11.0.2\"' >&2", monkeypatch)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("OUTBOX_TEST_INSTALL", "0")
    with pytest.raises(Unavailable, match="Java 17 or newer is not installed"):
        install.java(17)


# --- What a missing service does to a test run

SUITE = """
    import pytest
    from tests.services.fixtures import or_skip
    from tests.unit.test_services import Greeter

    @pytest.fixture(scope="session")
    def greeter(pytestconfig):
        service = Greeter(local=False)
        return or_skip(pytestconfig, service, service.obtain_own)

    def test_without_a_server():
        pass

    def test_with_one(greeter):
        pass

    def test_with_one_again(greeter):
        pass
"""


@pytest.fixture
def suite(
    pytester: pytest.Pytester, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    monkeypatch.delenv("CI", raising=False)
    pytester.makepyfile(SUITE)
    return pytester


def run(suite: pytest.Pytester) -> pytest.RunResult:
    return suite.runpytest_subprocess("-p", fixtures.__name__, "-p", "no:outbox", "-p", "no:cacheprovider")


def test_a_missing_service_skips_its_tests_and_the_run_ends_with_how_to_get_it(suite: pytest.Pytester) -> None:
    result = run(suite)
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(
        ["*services that this machine lacks*", "greeter: no engine; not installed. *plant a greeter."]
    )
    assert result.ret == 0


def test_in_ci_a_missing_service_is_a_failure(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = run(suite)
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["*services that this machine lacks*", "greeter: *"])
    assert result.ret != 0


CHOICE = """
    import pytest

    @pytest.fixture
    def pear_url():
        pass

    @pytest.mark.parametrize("server", ["apple", "pear"])
    def test_by_its_id(server):
        pass

    def test_by_its_fixture(pear_url):
        pass

    def test_of_none():
        pass
"""


def test_tests_can_be_chosen_by_the_servers_they_run_on(suite: pytest.Pytester) -> None:
    suite.makepyfile(CHOICE)
    arguments = ("-p", fixtures.__name__, "-p", "no:outbox", "-p", "no:cacheprovider")
    suite.runpytest_subprocess(*arguments, "--on=pear").assert_outcomes(passed=2, deselected=2)
    suite.runpytest_subprocess(*arguments, "--on=pear,apple").assert_outcomes(passed=3, deselected=1)


# --- Waiting


def test_waiting_ends_with_the_condition_or_the_deadline() -> None:
    began = time.monotonic()
    assert wait_until(lambda: time.monotonic() > began + 0.1, timeout=5)
    assert time.monotonic() < began + 4
    assert not wait_until(lambda: False, timeout=0.1)


def test_the_ping_of_a_port_where_nothing_listens_raises() -> None:
    with pytest.raises(ConnectionError, match="nothing listens"):
        KAFKA.ping(f"kafka://127.0.0.1:{free_port()}")
