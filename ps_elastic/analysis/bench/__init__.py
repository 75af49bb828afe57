"""Measurements that can be repeated, each with what it is compared to; one per file."""

from ps_elastic.analysis.bench.base import Benchmark, Row, benchmarks, row, run_all, run_benchmark

__all__ = ["Benchmark", "Row", "benchmarks", "row", "run_all", "run_benchmark"]
