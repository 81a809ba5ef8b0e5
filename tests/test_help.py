"""--help: every flag of every command has a text of its own, which names every choice."""

import argparse
import dataclasses
import inspect
import re

import pytest
import tyro
from trees import small_config

from sharding.rules import LAYOUTS, MESH_AXES
from v4jax.chat.encoding import MODES
from v4jax.checkpoint.formats import FORMATS as EXPORTS
from v4jax.cli.commands import COMMANDS, parser
from v4jax.data.config import FORMATS, Source
from v4jax.train.config import TrainConfig
from v4jax.train.stages import Stage

ALLOWED = {
    "layout": tuple(LAYOUTS),
    "dtype": ("float32", "bfloat16"),
    "quant": ("none", "official"),
    "attention": ("sparse", "dense", "indexer"),
    "export": (*EXPORTS, "none"),
    "data.format": FORMATS,
    "data.packing": ("split", "best_fit"),
    "data.tokenizer": ("byte", "byte-chat"),
    "data.chat.thinking_mode": MODES,
    "data.chat.train_on": ("all", "last"),
    "data.chat.too_long": ("error", "drop", "cut"),
    "data.chat.release": ("v4", "0731"),
}
"""Fields of a TrainConfig that take one of a few strings, and those strings."""


def test_help_names_every_mesh_axis(capsys):
    text = overrides(capsys)["mesh"]
    assert all(axis in text for axis in MESH_AXES), text


def commands() -> dict[str, argparse.ArgumentParser]:
    (subs,) = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return subs.choices


def overrides(capsys) -> dict[str, str]:
    """Flag -> text, without its default, of `v4jax train CONFIG.py --help`."""
    model = small_config()
    cfg = TrainConfig(
        model=model, run_dir="r", steps=1, batch_size=1, seq_len=2, learning_rate=1, warmup_steps=0
    )
    with pytest.raises(SystemExit) as stop:
        tyro.cli(TrainConfig, default=cfg, args=["--help"])
    assert not stop.value.code
    lines = [
        line.strip("│╭╰─╮╯ ")
        for line in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    ]
    flags = re.split(r"\n(?=--)", "\n".join(lines))
    found = {}
    for flag in flags[1:]:
        head = re.match(r"--(?:no-)?([\w.-]+)", flag)
        text = re.sub(r"^[^\n]*?(  +|\n)", "", flag, count=1).split("\n\n")[0]
        found[head[1].replace("-", "_")] = re.sub(r"\s*\(default:.*", "", " ".join(text.split()))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_says_what_it_is_for(command):
    texts = {action.dest: action.help for action in commands()[command]._actions}
    assert texts
    for name, text in texts.items():
        assert text and len(text) > 5, f"{command} --{name} has no text"
    assert len(set(texts.values())) == len(texts), "two flags share a text"


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train"}))
def test_the_help_of_a_command_prints(command, capsys):
    with pytest.raises(SystemExit) as stop:
        commands()[command].parse_args(["--help"])
    assert not stop.value.code
    assert f"v4jax {command}" in capsys.readouterr().out


def test_every_override_of_train_has_a_text_of_its_own(capsys):
    texts = overrides(capsys)
    assert len(texts) > 80
    for name, text in texts.items():
        assert len(text) > 10, f"--{name} has no text"
    for section in {name.rpartition(".")[0] for name in texts}:
        own = [text for name, text in texts.items() if name.rpartition(".")[0] == section]
        assert len(set(own)) == len(own), f"two flags of {section or 'the run'} share a text"


def test_the_text_of_an_override_names_every_allowed_value(capsys):
    texts = overrides(capsys)
    for name, allowed in ALLOWED.items():
        for value in allowed:
            assert re.search(rf"\b{value}\b", texts[name]), (
                f"--{name} does not name {value}: {texts[name]}"
            )


@pytest.mark.parametrize("config", [Source, Stage])
def test_fields_that_only_a_config_file_sets_are_described_too(config):
    source = inspect.getsource(config)
    for field in dataclasses.fields(config):
        assert re.search(rf'\n    {field.name}: [^\n]*\n    """\S', source), (
            f"{config.__name__}.{field.name}"
        )
