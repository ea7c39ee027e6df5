"""Failures of one cause have one fingerprint, whatever their texts, lines and processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from outbox.dead_letters.record import Failure, fingerprint


def charge(amount: str) -> None:
    check(amount)


def check(amount: str) -> None:
    raise ValueError(f"{amount} is no amount")


def refund(amount: str) -> None:
    raise ValueError(f"{amount} cannot be refunded")


def parse(text: str) -> None:
    json.loads(text)


def failure(function: Callable[[str], None], argument: str = "x") -> Failure:
    with pytest.raises(Exception) as caught:  # whatever it raises
        function(argument)
    # as the consumer sees it: the frames from its own call on
    return Failure.of("retries-exhausted", caught.value.with_traceback(caught.value.__traceback__))


def mark(of: Failure, consumer: str = "billing", type: str | None = "order.placed") -> str:
    return fingerprint(of, consumer, type)


def test_it_is_eight_hexadecimal_digits_in_upper_case() -> None:
    assert re.fullmatch("[0-9A-F]{8}", mark(failure(charge)))


def test_the_exceptions_text_does_not_matter() -> None:
    assert mark(failure(charge, "1")) == mark(failure(charge, "2"))


def test_where_it_was_raised_matters() -> None:
    assert mark(failure(charge)) != mark(failure(refund))


def test_exception_type_consumer_and_message_type_matter() -> None:
    base = failure(charge)
    other = Failure(base.reason, "KeyError", base.exception_message, base.stack, base.frame)
    marks = {mark(base), mark(other), mark(base, "shipping"), mark(base, type="order.cancelled"), mark(base, type=None)}
    assert len(marks) == 5


def test_the_frame_is_the_innermost_of_the_users_own() -> None:
    assert failure(charge).frame == f"{__name__}:check"
    # json's frames lie further in, and are nobody's here
    assert failure(parse).frame == f"{__name__}:parse"


def test_without_a_frame_of_the_users_the_reason_and_type_decide() -> None:
    error = ValueError("never raised")
    assert Failure.of("rejected", error).frame == ""
    assert mark(Failure("rejected")) != mark(Failure("expired"))


def test_a_handler_that_is_installed_as_a_wheel_is_the_users_code(tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    (packages / "shop").mkdir(parents=True)
    (packages / "shop" / "billing.py").write_text("def charge(): raise ValueError('no')\n")
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(packages)!r})
        from shop import billing
        from outbox.dead_letters.record import Failure
        try:
            billing.charge()
        except ValueError as error:
            error = error.with_traceback(error.__traceback__.tb_next)
            print(Failure.of("rejected", error).frame or "none", Failure.of("rejected", error, module="shop.billing").frame)
        """
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["none", "shop.billing:charge"]


def test_another_process_and_another_line_give_the_same(tmp_path: Path) -> None:
    marks = set()
    for lines, seed in ((0, "1"), (50, "2")):
        (tmp_path / "shop.py").write_text("\n" * lines + "def charge(): raise ValueError('no')\n")
        script = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
            "import shop\nfrom outbox.dead_letters.record import Failure, fingerprint\n"
            "try: shop.charge()\n"
            "except ValueError as error: print(fingerprint(Failure.of('rejected', error), 'billing', 'order.placed'))\n"
        )
        result = subprocess.run(
            [sys.executable, "-B", "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        )
        marks.add(result.stdout.strip())
    assert len(marks) == 1
