"""A rule, an update, an optimizer, a compressor and a tracker that do not fit together are refused at load time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ps_elastic import train
from ps_elastic.cli.config import command as config_command
from ps_elastic.config.load import check, load
from ps_elastic.errors import USAGE, ConfigError
from ps_elastic.policies import policies
from ps_elastic.worker.updates import updates

BASE = {"task": "quadratic"}
WRITERS = "views=torn writers=workers"

REFUSED: list[tuple[str, str, str]] = [  # overrides, key, part of the message
    ("update=cut_sgd", "update.name", "synchronous takes whole pushes; policies that take layers: salf, salf_fill"),
    ("policy=salf update=cut_sgd update.accumulate=2", "update.accumulate", "the gradient of some of the batches"),
    ("policy=salf update=sisa", "update.name", "units of model, but policy salf takes gradient or update"),
    ("policy=helpers:QueuedLayers", "policy.name", "helpers:QueuedLayers takes layers and queues jobs"),
    ("policy=salf buckets=auto", "buckets", "expected layer or a number of bytes: it measures the gain of sending"),
    ("policy=salf:deadline_s=0", "policy.deadline_s", "expected a number of seconds > 0"),
    ("policy=salf:empty=always", "policy.empty", "expected uniform, estimated or a list of numbers"),
    ("policy=salf policy.empty=[0.5,1]", "policy.empty", "expected probabilities from 0 to below 1"),
    ("policy=salf update=cut_sgd:deadline_s=-1", "update.deadline_s", "expected a number of seconds > 0"),
    ("policy=consensus", "update.name", "sgd pushes in units of gradient, but policy consensus takes model"),
    ("update=sisa", "update.name", "sisa pushes in units of model, but policy synchronous takes gradient or update"),
    ("update=local_sgd policy=consensus", "update.name", "units of update, but policy consensus takes model"),
    ("views=torn policy=elastic_bound", "views", "policy elastic_bound promises how far the workers' copies are"),
    ("views=torn policy=value_bounded", "views", "policy value_bounded promises how far the workers' copies are"),
    ("views=torn policy=delay_compensated", "views", "policy delay_compensated needs each worker's copy"),
    ("views=torn policy=norm_bounded", "views", "policy norm_bounded measures the copies of workers that still"),
    ("views=torn policy=variance_bounded", "views", "policy variance_bounded gives each worker a model of its own"),
    ("views=torn policy=asgrad", "views", "policy asgrad queues jobs with the model of their assignment"),
    ("views=torn policy=salf", "views", "policy salf takes the layers of a push one by one"),
    ("views=torn transport=messages", "transport", "expected auto or shared: reads are inconsistent where"),
    ("views=torn update.pipeline=1 policy=asynchronous", "update.pipeline", "expected 0: with views: torn a worker"),
    ("views=torn update=local_sgd policy=asynchronous", "update.name", "local_sgd changes the copy of the model that"),
    ("views=torn device=cuda", "device", "expected cpu: with views: torn workers compute on copies in the memory of"),
    ("writers=workers policy=asynchronous", "writers", "got 'workers', expected server, or views: torn with it"),
    (f"{WRITERS} policy=synchronous", "writers", "each with 1/p: asynchronous, delay_bounded, message_passing, stale"),
    (f"{WRITERS} policy=asynchronous optimizer.momentum=0.9", "optimizer.momentum", "expected 0: a worker that writes"),
    (f"{WRITERS} policy=asynchronous optimizer.weight_decay=0.1", "optimizer.weight_decay", "expected 0: a worker"),
    (f"{WRITERS} policy=asynchronous optimizer=adam", "optimizer.name", "expected sgd: a worker that writes the model"),
    ("writing=plain", "writing", "expected lock: it is for writers: workers"),
    ("update=local_sgd policy=elastic_bound", "update.name", "policy elastic_bound takes gradient"),
    ("update=local_sgd policy=value_bounded", "update.name", "policy value_bounded takes gradient"),
    ("update=local_sgd policy=delay_compensated", "update.name", "policy delay_compensated takes gradient"),
    ("optimizer.name=adam policy=elastic_bound", "optimizer.name", "got 'adam', but what policy elastic_bound"),
    ("optimizer.name=adamw policy=norm_bounded", "optimizer.name", "only known with sgd"),
    ("optimizer.name=adam policy=variance_bounded", "optimizer.name", "only known with sgd"),
    ("optimizer.name=adam policy=value_bounded", "optimizer.name", "only known with sgd"),
    ("optimizer.name=adam policy=deadline:missing=substitute", "optimizer.name", "deadline:missing=substitute bounds"),
    ("update=local_sgd optimizer.name=adam", "optimizer.name", "expected sgd: local_sgd pushes in units of update"),
    ("update=local_sgd optimizer.momentum=0.9", "optimizer.momentum", "got 0.9, expected 0"),
    ("update=sisa policy=consensus optimizer.weight_decay=0.1", "optimizer.weight_decay", "got 0.1, expected 0"),
    ("update.pipeline=1", "update.pipeline", "under policy synchronous a worker needs the reply"),
    ("update.pipeline=1 policy=fedbuff", "update.pipeline", "as it comes: asynchronous, message_passing"),
    ("update.pipeline=4 policy=message_passing:delay=4", "update.pipeline", "got 4, expected at most 3 with policy"),
    ("update.pipeline=1 policy=asynchronous optimizer.name=adam", "optimizer.name", "re-applies alpha/p times its own"),
    ("update.pipeline=1 policy=asynchronous transport=shared", "transport", "shared memory takes one push of a worker"),
    (
        "policy=delay_compensated tracker.discrepancy=off",
        "tracker.discrepancy",
        "needs each worker's copy of the",
    ),
    ("policy=delay_compensated tracker.discrepancy=bound", "tracker.discrepancy", "expected exact"),
    ("policy=elastic_bound tracker.discrepancy=bound", "tracker.discrepancy", "policy elastic_bound needs each"),
    ("policy=variance_bounded tracker.discrepancy=off", "tracker.discrepancy", "policy variance_bounded needs each"),
    ("policy=norm_bounded tracker.discrepancy=bound", "tracker.discrepancy", "applies gradients late"),
    ("policy=deadline:missing=substitute tracker.discrepancy=bound", "tracker.discrepancy", "expected exact or off"),
    ("update=sisa policy=consensus compressor=top_k", "compressor.name", "got 'top_k', expected identity: sisa pushes"),
    (
        "update=sisa policy=consensus compressor.error_feedback=true",
        "compressor.error_feedback",
        "expected auto or false",
    ),
]

ACCEPTED = [
    "policy=salf update=cut_sgd compressor=top_k optimizer.name=adam",
    "policy=salf_fill update=local_sgd tracker.discrepancy=off buckets=layer",
    "policy=message_passing:delay=4 update.pipeline=3 optimizer.momentum=0.9 compressor=top_k tracker.discrepancy=off",
    "policy=asynchronous update.pipeline=2 update=local_sgd tracker.discrepancy=bound",
    "policy=deadline optimizer.name=adam",
    "policy=deadline:missing=keep optimizer.name=adam optimizer.weight_decay=0.1",
    "policy=deadline:missing=substitute optimizer.momentum=0.9 optimizer.nesterov=true",
    "policy=elastic_bound:distance=path tracker.discrepancy=bound",
    "policy=variance_bounded:substitute=mean tracker.discrepancy=off",
    "policy=norm_bounded tracker.discrepancy=off update=local_sgd",
    "policy=norm_bounded optimizer.momentum=0.9 compressor=top_k",
    "policy=fedbuff optimizer.name=adam",
    "policy=fedbuff update=local_sgd:local_steps=2 update.accumulate=3 compressor=top_k tracker.discrepancy=off",
    "policy=random_subset update=local_sgd optimizer.clip_norm=1",
    "policy=delay_compensated optimizer.momentum=0.9",
    "policy=consensus update=sisa optimizer.clip_norm=1 tracker.discrepancy=off schedule=cosine",
    "policy=consensus update=sisa compressor.error_feedback=false buckets=layer",
]


@pytest.mark.parametrize(("overrides", "key", "part"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_does_not_fit_is_refused_by_key_and_reason(overrides: str, key: str, part: str) -> None:
    problems = check(BASE, overrides.split())
    assert [problem.key for problem in problems] == [key]
    assert part in problems[0].message and problems[0].exit_code == USAGE


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_what_fits_runs(tmp_path: Path, overrides: str) -> None:
    summary = train(
        BASE, [*overrides.split(), "train.samples=60", "optimizer.lr=0.01"], workers=3, run_dir=tmp_path / "r"
    )
    assert summary is not None and summary["used"] > 0


def cells() -> Iterator[tuple[str, str]]:
    for policy, _ in policies.items():
        for update, _ in updates.items():
            yield policy, update


@pytest.mark.parametrize(("policy", "update"), [*cells()])
def test_every_rule_with_every_update_runs_or_is_refused(tmp_path: Path, policy: str, update: str) -> None:
    rule, made = dict(policies.items())[policy], dict(updates.items())[update]
    fits = made.units in rule.units and (rule.layerwise or update != "cut_sgd")
    overrides = [f"policy={policy}", f"update={update}", "train.samples=40", "optimizer.lr=0.001"]
    try:
        summary = train(BASE, overrides, workers=4, run_dir=tmp_path / "r")
    except ConfigError as error:
        assert not fits and error.key == "update.name" and not (tmp_path / "r").exists()
    else:
        assert fits and summary is not None and summary["exit"] == 0


def test_every_rule_has_an_update_that_it_runs_with() -> None:
    for policy, cls in policies.items():
        fitting = [name for name, known in updates.items() if known.units in cls.units]
        assert any(check(BASE, [f"policy={policy}", f"update={update}"]) == [] for update in fitting)


def test_the_complaint_names_what_would_fit() -> None:
    (problem,) = check(BASE, ["policy=consensus"])
    assert "takes model (updates: sisa); policies that take gradient: asgrad, asynchronous" in problem.message
    (problem,) = check(BASE, ["update=sisa"])
    assert problem.message.endswith("policies that take model: consensus")


def test_validate_tells_all_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("task: quadratic\nupdate: local_sgd\noptimizer: {name: adam, weight_decay: 0.1}\n")
    found = CliRunner().invoke(config_command, ["validate", str(path), "--json"], standalone_mode=False)
    assert found.return_value == USAGE
    errors = json.loads(found.stdout)["errors"]
    assert [error["key"] for error in errors] == ["optimizer.name", "optimizer.weight_decay"]
    assert all(error["source"] == str(path) for error in errors)


def test_a_launcher_that_leaves_plugins_alone_leaves_this_to_the_ranks() -> None:
    assert load(BASE, ["update=sisa"], plugins=False).update.plugin.name == "sisa"
