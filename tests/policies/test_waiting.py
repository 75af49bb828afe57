"""The study of waiting: curves, the rule that knows everything, and the whole study made small."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ps_elastic.analysis.verify import Played, play
from ps_elastic.config.load import load

EXPERIMENTS = Path(__file__).resolve().parents[2] / "launch" / "experiments"
MODULES = ("waiting", "_curves", "_exact_step", "_page", "_waiting_plot", "_waiting_runs", "_waiting_text")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the experiment, without their underscore."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    torch.set_num_threads(1)
    yield SimpleNamespace(**{name.lstrip("_"): importlib.import_module(name) for name in MODULES if "plot" not in name})
    for name in MODULES:
        sys.modules.pop(name, None)


def played(policy: str, look: Any = id, start: float = 0.0, seed: int = 0) -> Played:
    run: dict[str, Any] = {
        "task": {"name": "quadratic", "start": start},
        "policy": policy,
        "optimizer": {"lr": 1 / 60},
        "train": {"samples": 160, "evaluate_every_samples": None},
        "simulation": {"compute": {"name": "exponential"}},
        "seed": seed,
    }
    return play(load(run, simulated=True), 8, look)


# ---- curves


def test_a_curve_leaves_out_what_waits_longer_for_more(study: SimpleNamespace) -> None:
    assert study.curves.curve([(4, 0.1), (1, 0.5), (2, 0.6), (3, 0.5)]) == [(1, 0.5), (4, 0.1)]


def test_a_curve_is_read_halfway_where_log_b_is_halfway(study: SimpleNamespace) -> None:
    assert study.curves.read([(1, 0.6), (4, 0.2)], 2) == pytest.approx((0.4, 0.6, 0.2))


def test_a_rule_that_is_nowhere_so_consistent_is_not_read_and_one_that_has_no_more_stays(
    study: SimpleNamespace,
) -> None:
    points = [(1, 0.6), (4, 0.2)]
    assert study.curves.read(points, 0.99) is None
    assert study.curves.read(points, 9) == (0.2, 0.2, None)
    assert study.curves.read([(0, 0.7), (4, 0.2)], 3) == (0.7, 0.7, 0.2)


# ---- the rule that knows, and the measure on the server's model


def knowing(server: Any) -> None:
    server.policy.watch(server)


@pytest.mark.parametrize("seed", [0, 1])
def test_who_knows_each_step_keeps_the_bound_waits_less_and_comes_nearer_to_it(
    study: SimpleNamespace, seed: int
) -> None:
    ours = played("elastic_bound:bound=0.4", seed=seed)
    exact = played("_exact_step:ExactStep:bound=0.4", knowing, seed=seed)
    assert ours.measures.beyond == exact.measures.beyond == 0
    assert max(ours.scaled) < max(exact.scaled) <= 0.4
    assert exact.waiting < ours.waiting - 0.02


def test_who_knows_and_has_no_budget_is_synchronous(study: SimpleNamespace) -> None:
    assert set(played("_exact_step:ExactStep:bound=0", knowing).scaled) == {0.0}


def test_the_distance_on_the_servers_model_is_the_one_that_is_logged_where_that_is_the_model(
    study: SimpleNamespace,
) -> None:
    heard: list[float] = []
    run = played("asynchronous", lambda server: study.waiting_runs.listen(server, heard))
    assert heard == pytest.approx(run.scaled)


def test_a_late_push_is_farther_from_the_servers_model_than_from_the_ideal_one(study: SimpleNamespace) -> None:
    heard: list[float] = []
    run = played("norm_bounded:beta=0.5", lambda server: study.waiting_runs.listen(server, heard), start=1.0)
    assert len(heard) >= len(run.scaled) and max(heard) > 2 * max(run.scaled)


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("bound", ["0.6", "4"])
def test_of_plain_sgd_value_bounded_decides_as_elastic_bound_does_by_the_path(bound: str, start: float) -> None:
    """So that the study has one column for both."""
    path = played(f"elastic_bound:bound={bound}:distance=path", start=start)
    value = played(f"value_bounded:threshold={bound}:falling=false", start=start)
    assert path.scaled == value.scaled and path.waiting == value.waiting > 0


# ---- the study


@pytest.fixture
def small(study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    runs = study.waiting_runs
    monkeypatch.setattr(runs, "OUT", tmp_path)
    monkeypatch.setattr(runs, "SIZES", {3: (2, 8)})
    monkeypatch.setattr(runs, "RUNS", {"training": (3,)})
    monkeypatch.setattr(runs, "DELAYS", {"exponential": runs.DELAYS["exponential"]})
    for rule, settings in runs.POLICIES.items():
        monkeypatch.setitem(runs.POLICIES, rule, settings[:3])
    return study


def test_the_study_made_small_gives_a_page_with_every_level_and_every_rival(
    small: SimpleNamespace, tmp_path: Path
) -> None:
    (cell,) = small.waiting_runs.all_cells()
    found = {cell: small.waiting_runs.points(cell)}
    (free,) = found[cell]["asynchronous"]
    assert free.waiting < 0.01
    made = small.waiting.evidence(found)
    assert small.waiting.publish(made, tmp_path / "pages") in (0, 6)
    page = (tmp_path / "pages" / "waiting.md").read_text()
    assert page.count("| training | exponential | 3 |") == len(small.waiting.LEVELS)
    assert page.count("at equal B_sup elastic_bound waits no longer than") == len(small.waiting.OTHERS)
    assert f"| {free.own.sup / 2:.3g} |" in page


def test_what_is_finished_is_not_run_again(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = small.waiting_runs.all_cells()
    first = small.waiting_runs.measure(cell, "asynchronous")
    monkeypatch.delattr(small.waiting_runs, "run")
    assert small.waiting_runs.measure(cell, "asynchronous") == first


def test_a_part_of_the_scale_becomes_a_budget(study: SimpleNamespace) -> None:
    assert study.waiting_runs.filled("a:bound={0.25}:b=c", 12.345) == "a:bound=3.09:b=c"
    assert study.waiting_runs.filled("a:bound=2", 12.345) == "a:bound=2"


def test_one_row_in_which_another_waits_less_is_said_and_fails(study: SimpleNamespace) -> None:
    w, read = study.waiting, study.curves.Read
    cell = study.waiting_runs.Cell("training", "exponential", 3)
    waits = {rule: read(0.3, 0.4, 0.2) for rule in (*study.waiting_runs.POLICIES, w.NORM_SERVER)}
    even = w.Row(cell, 1.0, waits)
    lost = w.Row(cell, 2.0, waits | {w.NORM: read(0.25, 0.3, None), w.SSP: None, w.NORM_SERVER: read(0.5, 0.5, 0.4)})
    assert w.tally([even, lost], w.NORM) == (0, 1, 1, 0)
    assert w.tally([even, lost], w.SSP) == (0, 1, 0, 1)
    assert w.tally([even, lost], w.NORM_SERVER) == (1, 1, 0, 0)
    assert [claim.holds for claim in w.claims([even, lost])] == [True, True, False, True]
    assert (
        "in 1 of 2 rows. If norm_bounded is measured on the server's model too, it does so in 2"
        in w.least([even, lost])[0]
    )
    assert w.behind_norm([even]) == []
    (text,) = w.behind_norm([even, lost])
    assert "In 1 rows, norm_bounded waits less" in text
    assert "in 0 of these rows. It waits longer than elastic_bound in 1, as long in 0 and less in 0" in text
    assert w.losses([even, lost]) == [
        "- than norm_bounded, training, exponential: in 1 of 2 rows, by 5.0 points at worst (3 workers, B_sup = 2)"
    ]


def test_the_plot_is_the_same_bytes_for_the_same_points(small: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra `plots`")
    draw = importlib.import_module("_waiting_plot").plot
    (cell,) = small.waiting_runs.all_cells()
    found = {cell: small.waiting_runs.points(cell)}
    for name in ("a.png", "b.png"):
        draw(found, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
