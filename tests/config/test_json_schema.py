"""The schema that `config schema` prints says of every key what `load` says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft202012Validator

from ps_elastic.cli import main
from ps_elastic.config.json_schema import json_schema
from ps_elastic.config.load import PLUGINS, check, load
from ps_elastic.config.plugin import one_line, registry, resolve
from ps_elastic.config.sources import read_file
from ps_elastic.plugins import Range
from tests.helpers import Blobs

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@dataclass
class Own(Blobs):
    """A task of one's own."""

    depth: int = 2  # layers; more: slower
    rate: Annotated[float, Range("a number > 0 and <= 1")] = 0.5
    pair: tuple[int, str] = (1, "a")
    mode: Literal["fast", "small"] | None = None
    sizes: dict[str, list[int]] | None = None
    other: object = None


@dataclass(kw_only=True)
class Needy(Blobs):
    needed: int


OWN = f"{__name__}:Own"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    made = json_schema()
    Draft202012Validator.check_schema(made)
    return made


def fits(schema: dict[str, Any], config: Any) -> bool:
    return Draft202012Validator(schema).is_valid(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_fits_as_it_is_written_and_in_full(path: Path, schema: dict[str, Any]) -> None:
    assert fits(schema, read_file(path))
    assert fits(schema, load(path).to_dict())
    assert fits(schema, load(path, ["faults.slow={workers: [1, 2], factor: 3}"], simulated=True).to_dict())


@pytest.mark.parametrize(("section", "kind"), PLUGINS.items())
def test_every_plugin_fits_with_all_of_its_settings(section: str, kind: str, schema: dict[str, Any]) -> None:
    for name, _ in registry(kind).items():
        plugin, problems = resolve(kind, {"name": name})
        line = one_line(name, {key: value for key, value in plugin.settings.items() if ":" not in str(value)})
        for stated in (name, line, plugin.to_dict()):
            assert not problems and fits(schema, {"task": "digits", section: stated}), stated
            assert not fits(schema, {"task": "digits", section: {**plugin.to_dict(), "oops": 3}})


GOOD: list[dict[str, Any]] = [
    {},
    {"name": None, "train": None, "policy": None, "faults": None, "simulation": {"compute": None}},
    {"policy": "first_k:k=3", "compressor": "top_k:ratio=0.5:error_feedback=false", "update": "sgd:accumulate=2"},
    {"policy": {"k": 3, "name": "first_k"}, "update": {"accumulate": 2}, "seed": 3.0},
    {"policy": {"name": "first_k:k=3"}, "optimizer": "adam:betas=[0.8, 0.9]"},
    {"schedule": {"name": "step:gamma=0.5", "step_samples": 9}},
    {"compressor": {"name": "my.own:Thing", "anything": 1, "error_feedback": "auto"}, "downlink": "my.own:Thing:x=3"},
    {"faults": {"slow": {"workers": 1}, "crash": [{"at_s": 3}, {"workers": [2, 3]}], "join": None}},
    {"buckets": 4, "server_threads": "auto", "optimizer": {"clip_norm": None}},
]  # fmt: skip
BAD: list[dict[str, Any]] = [
    {"polcy": "synchronous"},
    {"policy": "synchronus"},
    {"policy": "first_k:q=3"},
    {"policy": {"name": "first_k", "q": 3}},
    {"policy": {"k": 3}},
    {"policy": {"name": "first_k", "k": "x"}},
    {"policy": 3},
    {"task": None},
    {"task": {"batch_size": 3}},
    {"task": {"name": "digits", "batch_size": 2.5}},
    {"update": {"accumulate": 0}},
    {"update": {"pipeline": 256}},
    {"compressor": {"name": "top_k", "ratio": "much"}},
    {"compressor": {"error_feedback": "maybe"}},
    {"optimizer": {"lr": 0}},
    {"optimizer": {"lr": True}},
    {"optimizer": {"momentum": 1}},
    {"optimizer": {"betas": [0.9]}},
    {"optimizer": {"betas": [0.9, 1]}},
    {"optimizer": {"clip_norm": 0}},
    {"optimizer": "amad"},
    {"train": {"sampels": 3}},
    {"train": 3},
    {"train": {"samples": "1000"}},
    {"train": {"evaluate_every_samples": 0}},
    {"simulation": {"compute": {"speeds": [1, 0]}}},
    {"simulation": {"network": {"latency_s": -1}}},
    {"faults": {"slow": {"workers": 0}}},
    {"faults": {"slow": [3]}},
    {"faults": {"slwo": {}}},
    {"faults": [3]},
    {"buckets": 3},
    {"buckets": "parts"},
    {"seed": -1},
    {"seed": None},
    {"name": "a/b"},
]


@pytest.mark.parametrize("stated", GOOD, ids=str)
def test_what_load_takes_fits(stated: dict[str, Any], schema: dict[str, Any]) -> None:
    assert fits(schema, {"task": "digits", **stated})
    if "my.own" not in str(stated) and "faults" not in stated:
        assert check({"task": "digits", **stated}) == []


@pytest.mark.parametrize("stated", BAD, ids=str)
def test_what_load_refuses_key_by_key_does_not_fit(stated: dict[str, Any], schema: dict[str, Any]) -> None:
    assert check({"task": "digits", **stated})
    assert not fits(schema, {"task": "digits", **stated})


def test_the_task_is_required(schema: dict[str, Any]) -> None:
    assert not fits(schema, {})
    assert schema["required"] == ["task"]


def test_a_key_has_its_type_range_default_and_meaning(schema: dict[str, Any]) -> None:
    mapping = schema["properties"]["optimizer"]["anyOf"][0]
    assert mapping["properties"]["momentum"] == {
        "type": "number", "minimum": 0, "exclusiveMaximum": 1, "default": 0.0,
        "description": "of sgd: fraction of the last step that the next one keeps; larger: smoother, slower to turn",
    }  # fmt: skip
    assert mapping["description"].startswith("The server's optimizer, which applies the combined gradient")
    views = schema["properties"]["views"]
    assert (views["enum"], views["default"]) == (["exact", "torn"], "exact") and "torn: inconsistent" in views[
        "description"
    ]
    seed = dict(schema["properties"]["seed"])
    assert seed.pop("description").startswith("seed of the model and of all random draws")
    assert seed == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63, "default": 0}
    assert schema["properties"]["downlink"]["description"].startswith("compressor of the model broadcast")


def test_a_task_of_ones_own_is_told_exactly() -> None:
    schema = json_schema(OWN)
    Draft202012Validator.check_schema(schema)
    full = load({"task": OWN}).to_dict()
    assert fits(schema, full) and fits(schema, {"task": OWN}) and fits(schema, {"task": f"{OWN}:depth=3:rate=1"})
    mapping = schema["properties"]["task"]["anyOf"][-1]
    assert mapping["description"] == "A task of one's own." and mapping["additionalProperties"] is False
    assert mapping["properties"]["depth"] == {"type": "integer", "default": 2, "description": "layers; more: slower"}
    assert mapping["properties"]["rate"] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 0.5}
    good: list[dict[str, Any]] = [{"pair": [2, "b"], "mode": "fast"}, {"mode": None, "sizes": {"a": [1]}, "other": {}}]
    bad: list[dict[str, Any]] = [
        {"rate": 0}, {"rate": 2}, {"depht": 1},
        {"pair": ["b", 2]}, {"pair": [1]}, {"mode": "slow"}, {"sizes": {"a": 1}}, {"sizes": []}
    ]  # fmt: skip
    for stated in (*good, *bad):
        assert fits(schema, {"task": {"name": OWN, **stated}}) is (check({"task": {"name": OWN, **stated}}) == [])
        assert fits(schema, {"task": {"name": OWN, **stated}}) is (stated in good)
    assert not fits(schema, {"task": "digits"}) and not fits(schema, {"task": f"{OWN}:depht=1"})


def test_a_setting_without_a_default_is_required() -> None:
    schema = json_schema(f"{__name__}:Needy")
    assert not fits(schema, {"task": {"name": f"{__name__}:Needy"}})
    assert fits(schema, {"task": {"name": f"{__name__}:Needy", "needed": 3}})


def test_the_command_prints_it(schema: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema
    assert main(["config", "schema", "--task", "digits"]) == 0
    assert fits(json.loads(capsys.readouterr().out), {"task": {"name": "digits", "batch_size": 3}})
    assert main(["config", "schema", "--task", "digit"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "unknown task 'digit'; nearest 'digits'" in captured.err
