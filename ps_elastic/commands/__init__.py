"""One command of `ps-elastic` per file; `ps_elastic.cli` loads them when they are named."""
