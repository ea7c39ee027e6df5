from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.figures import Report

NAMES = ("add", "relay", "stores", "cleanup", "partitions", "transports")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure; starts the servers it needs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="repetitions; the median is printed")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: to see that it runs, not to quote")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    report = Report(as_json=options.json)
    for name in options.names or NAMES:
        importlib.import_module(f"benchmarks.{name}").run(
            report, repeat=options.repeat, scale=0.1 if options.quick else 1.0
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
