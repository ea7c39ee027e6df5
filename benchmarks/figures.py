"""One form for every figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Report:
    """Prints figures as they come: JSON objects, a line each, or a table."""

    as_json: bool = False

    def figure(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        reference: str | None = None,
        ratios: Sequence[float] = (),
    ) -> None:
        """The median of some repetitions, and of their ratios to a reference measured in the same run."""
        value = statistics.median(values)
        ratio = statistics.median(ratios) if ratios else None
        if self.as_json:
            line: dict[str, object] = {"figure": name, "value": _rounded(value), "unit": unit}
            if reference is not None and ratio is not None:
                line |= {"reference": reference, "ratio": round(ratio, 3)}
            print(json.dumps(line), flush=True)
        else:
            spread = f"{_rounded(min(values)):>10,} … {_rounded(max(values)):,}" if len(values) > 1 else ""
            beside = f"{ratio:6.2f} × {reference}" if reference is not None and ratio is not None else ""
            print(f"{name:<45} {_rounded(value):>12,} {unit:<6} {beside:<32} {spread}", flush=True)


def _rounded(value: float) -> float | int:
    return round(value) if abs(value) >= 100 else round(value, 2)
