"""Benchmarks: ``python -m benchmarks NAME [--json]``. Figures are ratios to a bare driver or a hand-written equivalent in the
same run, the median of several repetitions; docs/performance.md says what was seen and where the limits are."""
