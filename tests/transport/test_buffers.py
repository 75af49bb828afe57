from __future__ import annotations

import os
import subprocess
import sys

import pytest

LEFT_OUT = ("OMPI_MCA_osc", "OMPI_MCA_btl")


@pytest.mark.parametrize(("given", "seen"), [({}, "^ucx ^ofi"), ({"OMPI_MCA_btl": "self,sm"}, "^ucx self,sm")])
def test_mpi_starts_without_what_nobody_uses_unless_the_user_asks_for_it(given: dict[str, str], seen: str) -> None:
    code = f"import os, ps_elastic.transport.buffers; print(*(os.environ[name] for name in {LEFT_OUT}))"
    around = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    run = [sys.executable, "-c", code]
    ended = subprocess.run(
        run, env={**around, "MPI4PY_RC_INITIALIZE": "0", **given}, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.split() == seen.split(), ended.stderr
