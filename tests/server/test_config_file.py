"""`--config FILE`: the same options, in TOML, behind flags and environment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from momaserve.config import CacheConfig, EngineConfig, RoutingPolicy, SchedulerConfig
from momaserve.demo import CHECKPOINT
from momaserve.errors import ConfigError
from momaserve_server import cli
from momaserve_server.cli_options import (
    GENERATE_OPTIONS,
    SERVE_OPTIONS,
    add_model_source,
    add_options,
    engine_config,
    model_source,
    server_settings,
)
from momaserve_server.config_file import read_config_file
from momaserve_server.option import Option
from momaserve_server.settings import ServerSettings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "momaserve.toml"


def parse(
    file: Path, text: str, words: str = "", environment: dict[str, str] | None = None
) -> argparse.Namespace:
    file.write_text(text, encoding="utf-8")
    parser = argparse.ArgumentParser(prog="momaserve serve")
    add_model_source(parser)
    add_options(parser, SERVE_OPTIONS, environment or {})
    return parser.parse_args(["--config", str(file), *words.split()])


def test_a_file_sets_every_kind_of_option(file: Path) -> None:
    args = parse(
        file,
        """
        # one of each kind
        port = 0
        drain-timeout = 2
        image_fetch_timeout = 1.5
        served-model-name = "m"
        api-key = ["a", "b"]
        cors_origin = "https://a.example"
        no-access-log = true
        no_prefix_caching = false
        routing = "calibrated"
        max-num-requests = 3
        block-size = 8
        plan_ahead = "off"
        """,
    )
    assert server_settings(args) == ServerSettings(
        port=0,
        drain_timeout_s=2.0,
        image_fetch_timeout_s=1.5,
        served_model_name="m",
        api_keys=("a", "b"),
        cors_origins=("https://a.example",),
        access_log=False,
    )
    assert engine_config(args) == EngineConfig(
        routing=RoutingPolicy.CALIBRATED,
        plan_ahead=False,
        cache=CacheConfig(block_size=8),
        scheduler=SchedulerConfig(max_num_requests=3),
    )


def example(option: Option) -> tuple[str, Any]:
    """What a file may say for an option, and what its field becomes."""
    if option.sets is not None:
        return "true", option.sets
    if option.choices is not None:
        return f'"{option.choices[-1]}"', option.choices[-1]
    if option.repeats:
        return '["https://a.example"]', ["https://a.example"]
    if option.type in (int, float):
        return "7", option.type("7")
    return '"seven"', "seven"


@pytest.mark.parametrize("spelled", ["-", "_"])
def test_every_option_may_stand_in_a_file(file: Path, tmp_path: Path, spelled: str) -> None:
    keys = tmp_path / "seven"
    keys.write_text("k\n")
    examples = {option.dest: example(option) for option in SERVE_OPTIONS}
    examples["api_key_file"] = (f'"{keys}"', ("k",))
    lines = [f"{name.replace('_', spelled)} = {text}" for name, (text, _) in examples.items()]
    file.write_text("\n".join(lines))
    found = read_config_file(file, SERVE_OPTIONS).values
    assert found == {name: value for name, (_, value) in examples.items()}


@pytest.mark.parametrize(
    ("words", "environment", "port"),
    [
        ("", {}, 1),
        ("", {"MOMASERVE_PORT": "2"}, 2),
        ("--port 3", {"MOMASERVE_PORT": "2"}, 3),
        ("--port 3", {}, 3),
        ("", {"MOMASERVE_PORT": ""}, 1),
    ],
)
def test_flag_before_environment_before_file(
    file: Path, words: str, environment: dict[str, str], port: int
) -> None:
    assert server_settings(parse(file, "port = 1", words, environment)).port == port


@pytest.mark.parametrize(
    ("words", "environment", "keys"),
    [
        ("", {}, ("f", "g")),
        ("", {"MOMASERVE_API_KEY": "e, e2"}, ("e", "e2")),
        ("--api-key a --api-key b", {"MOMASERVE_API_KEY": "e"}, ("a", "b")),
        ("--api-key a", {}, ("a",)),
    ],
)
def test_a_list_replaces_the_one_behind_it(
    file: Path, words: str, environment: dict[str, str], keys: tuple[str, ...]
) -> None:
    args = parse(file, 'api-key = ["f", "g"]', words, environment)
    assert server_settings(args).api_keys == keys


@pytest.mark.parametrize(
    ("text", "environment", "is_on"),
    [
        ("no-prefix-caching = true", {}, False),
        ("no-prefix-caching = true", {"MOMASERVE_NO_PREFIX_CACHING": "0"}, True),
        ("no-prefix-caching = false", {"MOMASERVE_NO_PREFIX_CACHING": "1"}, False),
        ("no-prefix-caching = false", {}, True),
    ],
)
def test_a_switch_in_a_file(
    file: Path, text: str, environment: dict[str, str], is_on: bool
) -> None:
    assert engine_config(parse(file, text, "", environment)).cache.prefix_caching is is_on


def test_the_environment_may_name_the_file(file: Path, tmp_path: Path) -> None:
    file.write_text("port = 1")
    other = tmp_path / "other.toml"
    other.write_text("port = 2")
    for words, port in (([], 1), (["--config", str(other)], 2)):
        parser = argparse.ArgumentParser()
        add_options(parser, SERVE_OPTIONS, {"MOMASERVE_CONFIG": str(file)})
        assert server_settings(parser.parse_args(words)).port == port


def test_a_file_may_name_the_model(file: Path) -> None:
    assert model_source(parse(file, 'checkpoint = "here"')) == Path("here")
    preset = 'preset = "moma-90m-4t4i"\nrandom-weights = true'
    assert model_source(parse(file, preset)) == "moma-90m-4t4i"
    assert model_source(parse(file, preset, "there")) == Path("there")
    other = "--preset moma-90m-dense --random-weights"
    assert model_source(parse(file, 'checkpoint = "here"', other)) == "moma-90m-dense"
    assert model_source(parse(file, "")) == CHECKPOINT
    with pytest.raises(ConfigError):
        model_source(parse(file, 'checkpoint = "here"\n' + preset))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 9000", "unknown key 'prot': did you mean 'port'?"),
        ("max_num_request = 3", "unknown key 'max_num_request': did you mean 'max-num-requests'?"),
        ("zzz = 1", "unknown key 'zzz'"),
        ("[server]\nport = 1", "unknown key 'server'"),
        ('port = "9000"', "'port' must be an integer, not a string"),
        ("port = 9000.0", "'port' must be an integer, not a float"),
        ("port = true", "'port' must be an integer, not a boolean"),
        ('drain-timeout = "1"', "'drain-timeout' must be a number, not a string"),
        ("host = 1", "'host' must be a string, not an integer"),
        ("no-access-log = 1", "'no-access-log' must be a boolean, not an integer"),
        ('log-format = "xml"', "'log-format' must be one of text, json, not 'xml'"),
        ('api-key = ["secret", 5]', "'api-key' must be a string or an array of strings"),
        ("api-key = []", "'api-key' must be a string or an array of strings"),
        ("port = 1\nport = 2", "is not valid TOML"),
        ("max-n = 1\nmax_n = 2", "'max_n' is there twice"),
        ("port =", "is not valid TOML"),
        ('api-key-file = "/nowhere"', "the key file /nowhere cannot be read"),
        ("random-weights = 1", "'random-weights' must be a boolean, not an integer"),
    ],
)
def test_mistakes_are_bad_usage_that_names_file_and_key(
    file: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(file, text)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --config: {file}" in last or "key file" in last
    assert words in last
    assert "secret" not in last


def test_files_that_cannot_be_read(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, why in ((file, "No such file"), (file.parent, "Is a directory")):
        with pytest.raises(SystemExit) as end:
            cli.main(["serve", "--config", str(path)])
        assert end.value.code == 2
        assert f"{path}: {why}" in capsys.readouterr().err
    file.write_bytes(b"host = '\xff'")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--config", str(file)])
    assert "is not valid TOML" in capsys.readouterr().err


def test_a_value_out_of_range_names_its_limit(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("max-n = 17")
    assert cli.main(["serve", "--config", str(file)]) == 2
    assert "max_n must be between 1 and 16, got 17" in capsys.readouterr().err


def test_generate_reads_a_file_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text('dtype = "bfloat16"\nrouting = "threshold"')
    parser = argparse.ArgumentParser()
    add_model_source(parser)
    add_options(parser, GENERATE_OPTIONS, {})
    config = engine_config(parser.parse_args(["--config", str(file)]))
    assert (config.dtype, config.routing) == ("bfloat16", RoutingPolicy.THRESHOLD)
    file.write_text("port = 1")
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", str(file)])
    assert "unknown key 'port'" in capsys.readouterr().err
