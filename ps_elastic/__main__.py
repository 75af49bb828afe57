"""`python -m ps_elastic` is `ps-elastic`."""

from __future__ import annotations

import sys

from ps_elastic.cli import main

if __name__ == "__main__":
    sys.exit(main())
