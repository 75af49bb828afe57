from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pytest

from ps_elastic import plugins, train
from ps_elastic.config.load import load
from ps_elastic.errors import ConfigError
from ps_elastic.plugins import Registry, parse_one_line, settings, summary
from ps_elastic.policies import Policy, policies
from ps_elastic.policies.base import load_state, save_state
from ps_elastic.tasks import tasks
from tests.law.rules import Lottery


def test_every_module_of_the_package_is_found_without_being_named() -> None:
    names = [name for name, _ in policies.items()]
    assert names == sorted(names)
    assert {"asynchronous", "first_k", "stale_synchronous", "synchronous"} <= set(names)


def test_every_rule_is_a_dataclass_with_a_summary_a_source_and_its_share() -> None:
    for name, cls in policies.items():
        text = cls.__doc__ or ""
        assert dataclasses.is_dataclass(cls) and issubclass(cls, Policy), name
        assert summary(cls).endswith("."), name
        assert "Source:" in text and "Share:" in text, name
        assert policies.load(name) is cls


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(
        ConfigError, match="unknown policy 'stale_synchronus'; nearest 'stale_synchronous'; known: "
    ) as e:
        policies.load("stale_synchronus")
    assert e.value.key == "name"


def test_a_name_can_be_registered_only_once() -> None:
    registry: Registry[object] = Registry("thing", "nowhere")
    registry.register("one")(int)
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        registry.register("one")(float)


def test_a_class_outside_the_package_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    bound: int = 3\nclass Plain: pass\n"
        "number = 1\n"
    )
    (tmp_path / "broken_rules.py").write_text("import there_is_no_such_module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    mine = policies.load("my_rules:Mine")
    assert settings(mine) == {"bound": 3}
    assert (mine.__module__, mine.__qualname__) == ("my_rules", "Mine")
    for name, message in {
        "no_rules:Mine": "no module 'no_rules' for policy",
        "my_rules:Yours": "module 'my_rules' has no class 'Yours'",
        "my_rules:number": "has no class 'number'",
        "my_rules:Plain": "not a dataclass",
    }.items():
        with pytest.raises(ConfigError, match=message):
            policies.load(name)
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        policies.load("broken_rules:Mine")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration and the policy that it names; we are in another, and nothing was read so far."""
    folder, here = tmp_path / "elsewhere", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    (folder / "lying_beside.py").write_text(POLICY)
    (folder / "run.yaml").write_text("task: quadratic\npolicy: lying_beside:Mine\ntrain: {samples: 200}\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_beside", [])
    monkeypatch.delitem(sys.modules, "lying_beside", raising=False)
    return folder


POLICY = """
from dataclasses import dataclass
from ps_elastic.policies.rules.asynchronous import Asynchronous
@dataclass
class Mine(Asynchronous): ...
"""


def test_a_module_beside_the_configuration_is_found_also_by_the_run_s_own_one(elsewhere: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no module 'lying_beside' for policy 'lying_beside:Mine' in .*here, nor inst"
    ):
        load({"task": "quadratic", "policy": "lying_beside:Mine"})
    summary = train(elsewhere / "run.yaml", workers=2, run_dir="run")
    assert summary is not None and summary["policy"] == "lying_beside:Mine"
    plugins._beside.clear()
    sys.modules.pop("lying_beside")
    sys.path.remove(str(elsewhere))
    assert load("run/config.yaml").policy.name == "lying_beside:Mine"


def test_two_modules_of_one_name_are_not_taken_for_each_other(elsewhere: Path) -> None:
    first = policies.load(load(elsewhere / "run.yaml").policy.name)
    Path("lying_beside.py").write_text(POLICY)  # in our folder, which comes first
    second = policies.load(load(elsewhere / "run.yaml").policy.name)
    assert first is not second and sys.modules["lying_beside"].__file__ == str(Path("lying_beside.py").absolute())
    Path("theirs.py").write_text(POLICY)
    theirs = types.ModuleType("theirs")
    theirs.__file__ = "/of/somebody/else.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "theirs", theirs)
        with pytest.raises(ConfigError, match=r"is .*/here/theirs.py, but /of/somebody/else.py is in use"):
            policies.load("theirs:Mine")


def test_settings_are_the_init_fields_with_their_defaults() -> None:
    @dataclasses.dataclass
    class Plugin:
        needed: int
        plain: int = 2
        made: list[int] = dataclasses.field(default_factory=lambda: [1])
        state: int = dataclasses.field(init=False, default=0)

    assert settings(Plugin) == {"needed": dataclasses.MISSING, "plain": 2, "made": [1]}


def test_the_one_line_form_splits_into_name_and_settings() -> None:
    assert parse_one_line("top_k") == ("top_k", {})
    assert parse_one_line("top_k:ratio=0.01:error_feedback=false") == (
        "top_k",
        {"ratio": "0.01", "error_feedback": "false"},
    )
    assert parse_one_line("my.rules:Mine:bound=3") == ("my.rules:Mine", {"bound": "3"})
    assert parse_one_line("a:text=b=c") == ("a", {"text": "b=c"})
    for bad in ("a:b=1:c", "a:", "a:b:c"):
        with pytest.raises(ConfigError, match="expected key=value"):
            parse_one_line(bad)


def test_state_of_every_kind_goes_through_json_and_settings_do_not() -> None:
    rule, other = Lottery(seed=5), Lottery(seed=6)
    rule.count, rule.drawn = 3, [0.1, 0.25]
    rule.used, rule.per_worker = {(1, 2): (3, "used")}, {7: 1}  # type: ignore[dict-item]
    load_state(other, save_state(rule))
    assert (other.count, other.drawn, other.used, other.per_worker) == (3, [0.1, 0.25], {(1, 2): (3, "used")}, {7: 1})
    assert other.seed == 6
    other.drawn.append(1.0)
    assert rule.drawn == [0.1, 0.25]


def test_state_that_json_cannot_hold_is_refused_by_type() -> None:
    rule = Lottery()
    rule.drawn = {1.0}  # type: ignore[assignment]
    with pytest.raises(TypeError, match="a policy's state has set"):
        save_state(rule)


def test_a_record_of_an_earlier_version_finds_its_task() -> None:
    assert tasks.load("ps_elastic.bench.tasks:Wide") is tasks.load("ps_elastic.analysis.bench.tasks:Wide")
