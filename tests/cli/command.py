"""The command `outbox`: as people run it, and without a process of its own where only what it says is asked."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outbox.cli import main

PASSWORD = "hunter2-and-more"


@dataclass(frozen=True)
class Done:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.status in (0, 1), self.err
        return json.loads(self.out)


# `outbox`, when nobody has the patience to see whether a database that is away comes back.
IMPATIENT = (
    "import sys; from outbox.relay import _relay; from outbox.cli import main; _relay.PATIENCE = 0.5; sys.exit(main())"
)


def outbox(*arguments: str, folder: Path | None = None, patient: bool = True, **environment: str) -> Done:
    """Run `outbox …` in ``folder``, with these environment variables and none of ours."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OUTBOX_", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", *(["-m", "outbox"] if patient else ["-c", IMPATIENT]), *arguments],
        cwd=folder,
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert PASSWORD not in done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def quick(*arguments: str) -> Done:
    """`outbox …` in this process: the same, a second sooner."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
    return Done(status, out.getvalue(), err.getvalue())


def refused(done: Done, status: int, *words: str) -> None:
    """A command that said in one line what is wrong, and ended with that status."""
    assert done.status == status, done
    assert "Traceback" not in done.err
    assert done.out == ""
    line = done.err.strip().splitlines()[-1]
    assert line.startswith(("outbox ", "outbox: ")), done.err
    for word in words:
        assert word in line
