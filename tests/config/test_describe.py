"""What a key means is read from where its field is written."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, get_args

import pytest

from ps_elastic.config.describe import Key, keys, meanings
from ps_elastic.config.faults import Faults
from ps_elastic.config.load import PLUGINS
from ps_elastic.config.plugin import Plugin, registry
from ps_elastic.config.schema import Config
from ps_elastic.plugins import Range, init_types


@dataclass
class Base:
    needed: int  # steps
    inherited: float = 0.5  # of the base


@dataclass
class Own(Base):
    """A # that is no comment."""

    # versions; larger: staler.
    # Two lines, and one beside it:
    bound: Annotated[int, Range("a number of versions >= 0")] = 4  # the third
    wrapped: str = (
        "a # in text"  # beside the default
    )  # fmt: skip

    # of nothing: an empty line follows

    silent: bool = True
    inherited: float = 0.7
    state: int = field(default=0, init=False)  # no setting

    def method(self) -> int:
        local: int = 3  # no setting either
        return local


def test_a_meaning_is_beside_its_field_or_right_above_it() -> None:
    assert meanings(Own) == {
        "needed": "steps",
        "inherited": "of the base",
        "bound": "versions; larger: staler. Two lines, and one beside it: the third",
        "wrapped": "beside the default",
    }


def test_a_key_has_its_default_and_the_words_that_other_values_are_refused_with() -> None:
    told = {key.name: key for key in keys(Own)}
    assert list(told) == ["needed", "inherited", "bound", "wrapped", "silent"]
    assert told["needed"] == Key("needed", MISSING, "a whole number", "steps")
    assert told["bound"].expected == "a number of versions >= 0" and told["bound"].default == 4
    assert told["silent"] == Key("silent", True, "true or false", "")


def test_without_a_source_there_are_no_meanings() -> None:
    made = dataclass(type("Made", (), {"__annotations__": {"x": int}, "__module__": __name__}))
    assert meanings(made) == {}


def sections(cls: type) -> list[type]:
    """The dataclass and those of its fields that are sections of their own."""
    inner = [hint for hint in init_types(cls).values() if is_dataclass(hint) and hint not in (Faults, Plugin)]
    return [cls, *(found for one in inner for found in sections(one))]  # type: ignore[arg-type]


PLUGGED = [cls for kind in dict.fromkeys(PLUGINS.values()) for _, cls in registry(kind).items()]
FAULTS = [get_args(hint)[0] for hint in init_types(Faults).values()]
DESCRIBED = [*sections(Config), *FAULTS, *PLUGGED]


@pytest.mark.parametrize("cls", DESCRIBED, ids=lambda cls: cls.__name__)
def test_every_key_of_the_configuration_has_a_meaning(cls: type) -> None:
    inner = {"plugin", *(f.name for f in fields(cls) if is_dataclass(init_types(cls).get(f.name)))}
    assert [key.name for key in keys(cls) if not key.meaning and key.name not in inner] == []


def test_every_section_is_described() -> None:
    assert len(DESCRIBED) > 40 and all(get_args(hint) or isinstance(hint, type) for hint in init_types(Config).values())
