"""What a verb's module says about the verb is read from its source as it is by its import."""

import dataclasses

import pytest

from megatron_r1.commands.cli import VERB_MODULES
from megatron_r1.commands.verb_module import VerbHeader, load_verb, read_verb


@pytest.mark.parametrize("name", VERB_MODULES)
def test_the_source_says_what_the_module_does(name):
    read, loaded = read_verb(name, VERB_MODULES[name]), load_verb(name, VERB_MODULES[name])
    assert read.about and type(read) is VerbHeader
    for field in dataclasses.fields(VerbHeader):
        assert getattr(read, field.name) == getattr(loaded, field.name)
