"""The benchmarks of the message path on real ranks, as small as they go."""

from __future__ import annotations

import uuid
from pathlib import Path

import psutil
import pytest

from ps_elastic.analysis.bench import jobs, run_benchmark
from ps_elastic.cluster.environment import Mpi
from ps_elastic.errors import PlatformError

pytestmark = [pytest.mark.mpi, pytest.mark.slow]


def test_phases_take_turns_and_each_rank_tells_what_it_found(mpi: Mpi) -> None:
    ping = {"do": "ping_pong", "nbytes": 64, "rounds": 5}
    config = jobs.wide(100, workers=1, pushes=20)
    found = jobs.run_phases(
        2, [("bare", ping), ("ours", {"do": "train", "config": config, "watched": True}), ("bare", ping)]
    )
    assert [[len(times) for times in turn] for turn in found["bare"]] == [[0, 5], [0, 5]]
    [[server, worker]] = found["ours"]
    assert server["summary"]["pushes"] == 20
    assert len(server["looks"]) == 21  # its pushes, and a farewell
    assert server["looks"] == sorted(server["looks"])
    assert len(jobs.round_trips_s(worker)) == 19  # of the first nobody tells when it began
    assert all(0 < trip < server["summary"]["wall_s"] for trip in jobs.round_trips_s(worker))


def test_senders_compute_nothing_and_the_server_takes_all_they_send(mpi: Mpi) -> None:
    config = jobs.wide(100, workers=2, pushes=20)
    [[server, *workers]] = jobs.run_phases(3, [("send", {"do": "send", "config": config})])["send"]
    assert server["summary"]["pushes"] >= 40
    assert sum(len(worker["trips"]) for worker in workers) >= 40


def test_a_job_that_fails_is_told_with_its_last_words_and_leaves_nothing(
    mpi: Mpi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex  # by which this job's processes are told from those of others
    monkeypatch.setenv("PS_ELASTIC_TEST", mark)
    wrong = jobs.wide(100, workers=1, pushes=5, compute_s=-1)
    with pytest.raises(PlatformError, match=r"a job of 2 ranks ended with \d+: ps-elastic: task.compute_s: got -1"):
        jobs.run_phases(2, [("ours", {"do": "train", "config": wrong})])
    monkeypatch.setattr(jobs, "LIMIT_S", 3.0)
    with pytest.raises(PlatformError, match="a job of 2 ranks took longer than 3 s"):
        jobs.run_ranks(2, ["-c", "import time; time.sleep(60)"], tmp_path)
    assert not [process for process in psutil.process_iter() if _variables(process).get("PS_ELASTIC_TEST") == mark]


def _variables(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("step:sizes=[3000]:steps=[5]:repeats=1", 3),
        ("roundtrip:parameters=50000:tensors=5:bucket_bytes=40000:rounds=3:repeats=1", 2),
        ("latency:rounds=20:asleep_rounds=5:repeats=1", 6),
        ("rate:many=5:pushes=60:repeats=1", 3),
        ("scale:ranks=[2, 4]:pushes=30:repeats=1", 2),
        ("idle:pushes=8:away_s=0.02:repeats=1", 4),
        ("startup:ranks=2:repeats=1", 2),
        ("memory:parameters=1000000:pushes=1", 4),
    ],
)
def test_every_benchmark_measures(mpi: Mpi, text: str, rows: int) -> None:
    found = run_benchmark(text)["rows"]
    assert len(found) == rows
    for line in found:
        assert line["met"] in ((True, False) if line["target"] else (None,))
        difference = "overhead" in line["case"] or "above" in line["case"]  # below zero, where so little is measured
        assert difference or line["ours"] > 0
