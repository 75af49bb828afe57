from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import pytest

from ps_elastic.config.load import check, load
from ps_elastic.config.sections import Compute, Network, Norms
from ps_elastic.errors import ConfigError
from ps_elastic.simulation.costs import Cores, Durations, NetworkLinks, generator, typical_s


def times(settings: Compute, worker: int, count: int, *, workers: int = 8, seed: int = 0) -> list[float]:
    draw = Durations(settings, workers, seed).of(worker)
    return [draw() for _ in range(count)]


def test_a_constant_time_is_the_mean() -> None:
    assert times(Compute(mean_s=0.3), 1, 3) == [0.3] * 3


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("settings", "variance"), [(Compute("exponential", 2.0), 4.0), (Compute("pareto", 2.0, shape=5.0), 4.0 / 15)]
)
def test_random_times_have_the_stated_mean(settings: Compute, variance: float, seed: int) -> None:
    drawn = times(settings, 3, 20_000, seed=seed)
    assert fmean(drawn) == pytest.approx(2.0, abs=5 * math.sqrt(variance / len(drawn)))
    assert min(drawn) > (0 if settings.name == "exponential" else 2.0 * 4 / 5 - 1e-9)


def test_a_pareto_tail_falls_with_its_exponent() -> None:
    least = 4 / 5  # of mean 1 and exponent 5
    late = fmean(time > 2 * least for time in times(Compute("pareto", 1.0, shape=5.0), 1, 50_000))
    assert late == pytest.approx(2**-5.0, rel=0.1)


def test_what_a_worker_draws_does_not_depend_on_the_others() -> None:
    settings = Compute("exponential")
    alone = times(settings, 2, 5)
    one, two, seven = map(Durations(settings, 8, 0).of, (1, 2, 7))
    mixed = []
    for _ in range(5):
        one()
        mixed.append(two())
        seven()
    assert mixed == alone
    assert times(settings, 2, 5, seed=1) != alone
    assert times(settings, 3, 5) != alone


def test_speeds_are_given_out_in_turn_and_divide_the_time() -> None:
    settings = Compute(mean_s=1.0, speeds=(1.0, 2.0, 5.0))
    assert [times(settings, worker, 1)[0] for worker in range(1, 6)] == pytest.approx([1, 0.5, 0.2, 1, 0.5])


def test_a_spread_gives_every_worker_a_speed_of_its_own_for_good() -> None:
    drawn = [times(Compute(mean_s=1.0, spread=0.5), worker, 2) for worker in range(1, 400)]
    assert all(first == second for first, second in drawn)
    logs = [math.log(first) for first, _ in drawn]
    assert fmean(logs) == pytest.approx(0.0, abs=0.1)
    assert math.sqrt(fmean(x * x for x in logs)) == pytest.approx(0.5, rel=0.15)


def test_so_many_workers_are_stragglers_for_the_whole_run() -> None:
    slow = Compute(mean_s=1.0, straggler_share=0.25, straggler_factor=4.0)
    drawn = [times(slow, worker, 2) for worker in range(1, 9)]
    assert sorted(first for first, _ in drawn) == [1.0] * 6 + [4.0] * 2
    assert all(first == second for first, second in drawn)
    assert [times(slow, worker, 1, seed=3)[0] for worker in range(1, 9)] != [first for first, _ in drawn]


def test_any_push_may_be_slow_with_the_stated_chance() -> None:
    drawn = times(Compute(mean_s=1.0, straggler_chance=0.1, straggler_factor=3.0), 1, 20_000)
    assert set(drawn) == {1.0, 3.0}
    assert fmean(time == 3.0 for time in drawn) == pytest.approx(0.1, abs=0.01)


def test_a_trace_of_one_file_is_repeated_and_entered_at_different_places(tmp_path: Path) -> None:
    path = tmp_path / "times.txt"
    path.write_text("1.0\n2.0\n3.0\n4.0\n")
    settings = Compute("trace", trace=str(path))
    assert times(settings, 1, 6) == [1.0, 2.0, 3.0, 4.0, 1.0, 2.0]
    starts = {times(settings, worker, 1)[0] for worker in range(2, 40)}
    assert starts == {1.0, 2.0, 3.0, 4.0}


def test_a_trace_of_a_run_is_a_series_for_each_worker(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    for rank, compute_s in ((1, 0.5), (2, 0.7)):
        line = {"event": "reply", "compute_s": compute_s, "encode_s": 0.25}
        (tmp_path / "metrics" / f"rank-00{rank}.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "metrics" / "rank-000.jsonl").write_text('{"event": "used"}\n')
    settings = Compute("trace", trace=str(tmp_path))
    assert [times(settings, worker, 1)[0] for worker in (1, 2, 3)] == [0.75, 0.95, 0.75]


@pytest.mark.parametrize(
    ("text", "message"), [(None, "No such file"), ("", "no times"), ("1\nx\n", "is no trace"), ("1\n-2", "not > 0")]
)
def test_a_trace_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "times.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Durations(Compute("trace", trace=str(path)), 2, 0)
    assert caught.value.key == "simulation.compute.trace"


def test_who_is_ready_first_gets_the_first_free_core() -> None:
    cores = Cores(2)
    assert [cores.take(now, duration) for now, duration in ((0, 5), (0, 1), (0, 1), (3, 1), (3, 1))] == [0, 0, 1, 3, 4]


def test_a_message_takes_latency_and_its_bytes_over_the_slower_link() -> None:
    assert NetworkLinks(Network(latency_s=0.5)).up(1.0, 10**9) == 1.5
    assert NetworkLinks(Network(latency_s=0.5, bandwidth_bytes_per_s=100)).up(1.0, 200) == 3.5
    assert NetworkLinks(Network(0.5, 100, 50)).down(1.0, 200) == 5.5
    assert NetworkLinks(Network(0.5, 50, 100)).down(1.0, 200) == 5.5


def test_the_link_of_the_server_carries_one_message_after_another_in_each_direction() -> None:
    wires = NetworkLinks(Network(0.0, None, 100))
    assert [wires.up(0.0, 100), wires.up(0.0, 100), wires.up(5.0, 100)] == [1.0, 2.0, 6.0]
    assert wires.down(0.0, 100) == 1.0


def test_the_server_deals_with_one_push_after_another() -> None:
    wires = NetworkLinks(Network(service_s=1.0))
    assert [wires.serve(now, 1.0) for now in (0.0, 0.5, 5.0)] == [1.0, 2.0, 6.0]
    assert wires.serve(5.5, 0.0) == 6.0  # what takes no time waits its turn


def test_norms_decay_to_their_final_value_by_half_lives() -> None:
    assert Norms(initial=3.0).at(10**6) == 3.0
    norms = Norms(initial=3.0, final=1.0, half_life_samples=100)
    assert [norms.at(samples) for samples in (0, 100, 200)] == [3.0, 2.0, 1.5]


def test_the_typical_time_is_that_of_one_slow_push_there_and_back() -> None:
    compute = Compute(mean_s=1.0, speeds=(1.0, 0.5), straggler_factor=3.0)
    assert typical_s(compute, Network(0.25, 100, None, 0.5), 100, 200) == pytest.approx(6 + 3 + 0.5 + 0.5)


def test_generators_differ_by_seed_purpose_and_worker() -> None:
    keys = [(0, "compute", 1), (1, "compute", 1), (0, "speed", 1), (0, "compute", 2)]
    assert len({generator(*key).random() for key in keys}) == 4
    assert generator(0, "compute", 1).random() == generator(0, "compute", 1).random()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("simulation.compute.mean_s=0", "simulation.compute.mean_s: got 0.0, expected a number of seconds > 0"),
        ("simulation.compute={name: pareto, shape: 1}", "simulation.compute.shape: got 1.0, expected a number > 1"),
        (
            "simulation.compute.shape=3",
            "simulation.compute.shape: got 3.0, expected its default, 2.5: it is for pareto",
        ),
        ("simulation.compute.name=trace", "simulation.compute.trace: required with name=trace"),
        ("simulation.compute.name=paretto", "simulation.compute.name: unknown value 'paretto'; nearest 'pareto'"),
        ("simulation.compute.cores=0", "simulation.compute.cores: got 0"),
        ("simulation.compute=3", "simulation.compute: got 3, expected a mapping of keys"),
        ("simulation.network.latency=3", "unknown key 'latency'; nearest 'latency_s'"),
        ("simulation.network.bandwidth_bytes_per_s=0", "simulation.network.bandwidth_bytes_per_s: got 0.0"),
        ("simulation.norms.coherence=2", "simulation.norms.coherence: got 2.0, expected a number from 0 to 1"),
        ("simulation.norms.final=0.1", "simulation.norms.final: final and half_life_samples go together"),
        ("simulation.deadline_s=0", "simulation.deadline_s: got 0.0"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_dotted_key(override: str, message: str) -> None:
    errors = check({"task": "quadratic"}, [override])
    assert any(message in str(error) for error in errors), errors


def test_the_resolved_section_reads_back_the_same() -> None:
    overrides = ["simulation.compute={name: pareto, speeds: [1, 2]}", "simulation.network.service_s=1e-3"]
    config = load({"task": "quadratic"}, overrides)
    assert config.simulation.compute.speeds == (1.0, 2.0)
    assert load(config.to_dict()) == config
