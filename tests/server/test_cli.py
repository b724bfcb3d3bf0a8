"""The `momaserve` command: quick help, environment, exit codes, one line per mistake."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from momaserve.config import (
    CacheConfig,
    EngineConfig,
    RoutingPolicy,
    SchedulerConfig,
    Scheduling,
)
from momaserve.demo import CHECKPOINT
from momaserve.engine import Engine
from momaserve.errors import CheckpointError, ConfigError, PromptError
from momaserve.llm import ChoiceResult, RequestResult
from momaserve.models.generation import GenerationDefaults
from momaserve.outputs import FinishReason
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve_server import cli, generate
from momaserve_server.cli_options import (
    SERVE_OPTIONS,
    add_model_source,
    add_options,
    engine_config,
    model_source,
    server_settings,
)
from momaserve_server.generate import OutputError, read_picture, save_pictures
from momaserve_server.generate_options import add_arguments
from momaserve_server.settings import ServerSettings
from tests.server.fake_engine import FakeEngine
from tests.server.test_media import png

HEAVY = ("torch", "fastapi", "uvicorn", "pydantic", "PIL", "numpy")


def parse_serve(words: list[str], environment: dict[str, str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="momaserve serve")
    add_model_source(parser)
    add_options(parser, SERVE_OPTIONS, environment or {})
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words", [["--help"], ["serve", "--help"], ["generate", "--help"], ["info", "--help"], []]
)
def test_help_is_light(words: list[str]) -> None:
    code = (
        "import sys\nfrom momaserve_server.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["serve", "--nonsense"],
        ["serve", "--port", "x"],
        ["serve", "--dtype", "int4"],
        ["serve", "--routing", "threshold"],
        ["serve", "--prompt-routing", "threshold"],
        ["serve", "--block-size", "3"],
        ["serve", "--port", "70000"],
        ["serve", "--max-body-bytes", "0"],
        ["serve", "--drain-timeout", "-1"],
        ["generate"],
        ["generate", "--prompt", "x", "--n", "0"],
        ["generate", "--prompt", "x", "--mode", "song"],
        ["generate", "--prompt", "x", "--guidance-scale", "21"],
        ["generate", "--prompt", "x", "--repetition-penalty", "0"],
        ["generate", "--prompt", "x", "--presence-penalty", "2.5"],
        ["generate", "--prompt", "x", "--frequency-penalty", "nan"],
        ["generate", "--prompt", "x", "--min-tokens", "3", "--max-tokens", "2"],
        ["serve", "--no-prefix-caching=now"],
        ["serve", "--api-key", ""],
        ["serve", "--api-key", "two words"],
        ["serve", "--api-key-file", "/nowhere/keys"],
        ["serve", "--cors-origin", "example.com"],
        ["serve", "--cors-origin", "https://example.com/"],
        ["serve", "--root-path", "llm"],
        ["serve", "--root-path", "/llm/"],
        ["serve", "--allow-image-host", "https://example.com"],
        ["serve", "--allow-image-host", "example.com:99999"],
        ["serve", "--allow-image-host", "user@example.com"],
        ["serve", "--image-fetch-timeout", "0"],
        ["serve", "--metrics-prefix", "vllm:"],
        ["serve", "--metrics-prefix", "0x"],
        ["serve", "--metrics-prefix", ""],
        ["serve", "--otlp-traces-endpoint", "localhost:4318"],
        ["serve", "--log-format", "xml"],
        ["serve", "--log-level", "loud"],
        ["serve", "--max-n", "17"],
        ["serve", "--max-logprobs", "-1"],
        ["serve", "--max-stop", "9"],
        ["serve", "--max-output-tokens", "0"],
        ["serve", "--shadow-eval", "-0.1"],
        ["serve", "--shadow-eval", "1.5"],
        ["serve", "--shadow-eval", "nan"],
        ["serve", "--shadow-eval", "often"],
    ],
)
def test_bad_usage_is_exit_code_2_in_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(words)
    except SystemExit as end:  # argparse's own way
        code = int(str(end.code))
    assert code == 2
    shown = capsys.readouterr().err
    assert "error: " in shown.splitlines()[-1]
    assert "Traceback" not in shown


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_missing_checkpoint_is_exit_code_1_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, str(tmp_path / "none")]
    words += ["--port", "0"] if command == "serve" else ["--prompt", "x"]
    assert cli.main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"momaserve {command}: error: ")
    assert str(tmp_path / "none") in last


def test_errors_of_commands_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: BaseException) -> int:
        def run(args: argparse.Namespace) -> int:
            raise error

        monkeypatch.setattr(generate, "run", run)
        return cli.main(["generate", "--prompt", "x"])

    assert fail(CheckpointError("broken")) == 1
    assert capsys.readouterr().err == "momaserve generate: error: broken\n"
    assert fail(KeyboardInterrupt()) == 130
    assert fail(ModuleNotFoundError("No module named 'tqdm'", name="tqdm")) == 1
    assert "'tqdm'" in capsys.readouterr().err


def test_every_server_setting_has_an_option_and_its_default() -> None:
    settings = [o for o in SERVE_OPTIONS if o.owner is ServerSettings]
    options = {o.target for o in settings}
    assert len(settings) == len(options) + 1  # --api-key and --api-key-file fill one field
    assert options == {f.name for f in fields(ServerSettings)}
    assert server_settings(parse_serve([])) == ServerSettings()
    assert engine_config(parse_serve([])) == EngineConfig()


def test_every_engine_setting_has_an_option() -> None:
    for owner in (EngineConfig, CacheConfig, SchedulerConfig):
        options = {o.target for o in SERVE_OPTIONS if o.owner is owner}
        assert options == {f.name for f in fields(owner)} - {"cache", "scheduler", "keep_weights"}


def test_options_reach_the_configuration() -> None:
    engine = "--dtype float32 --threads 1 --block-size 8 --max-num-requests 3 --plan-ahead off"
    routing = "--routing calibrated --prompt-routing expert_choice"
    server = "--host ::1 --port 0 --drain-timeout 1.5 --served-model-name m"
    steps = "--scheduling router-aware --max-num-passes 5 --step-time-target-ms 80.5"
    args = parse_serve(f"{engine} {routing} {server} {steps}".split())
    assert engine_config(args) == EngineConfig(
        dtype="float32",
        threads=1,
        plan_ahead=False,
        routing=RoutingPolicy.CALIBRATED,
        prompt_routing=RoutingPolicy.EXPERT_CHOICE,
        cache=CacheConfig(block_size=8),
        scheduler=SchedulerConfig(
            max_num_requests=3,
            scheduling=Scheduling.ROUTER_AWARE,
            max_num_passes=5,
            step_time_target_ms=80.5,
        ),
    )
    assert server_settings(args) == ServerSettings(
        host="::1", port=0, drain_timeout_s=1.5, served_model_name="m"
    )


def test_first_come_first_served_can_be_asked_for() -> None:
    args = parse_serve(["--scheduling", "fcfs"])
    assert engine_config(args).scheduler == SchedulerConfig(scheduling=Scheduling.FCFS)
    args = parse_serve(["--scheduling", "fcfs", "--max-num-passes", "3"])
    with pytest.raises(ConfigError, match="max_num_passes 3 needs scheduling router-aware"):
        engine_config(args)


def test_environment_gives_defaults_and_the_command_line_wins() -> None:
    environment = {"MOMASERVE_PORT": "9000", "MOMASERVE_DTYPE": "float32", "MOMASERVE_HOST": ""}
    args = parse_serve(["--dtype", "bfloat16"], environment)
    assert server_settings(args) == ServerSettings(port=9000)
    assert engine_config(args).dtype == "bfloat16"
    names = {option.environment_name for option in SERVE_OPTIONS}
    assert {"MOMASERVE_DRAIN_TIMEOUT", "MOMASERVE_PROMPT_ROUTING"} <= names


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], {}, True),
        (["--no-prefix-caching"], {}, False),
        ([], {"MOMASERVE_NO_PREFIX_CACHING": "1"}, False),
        ([], {"MOMASERVE_NO_PREFIX_CACHING": "True"}, False),
        ([], {"MOMASERVE_NO_PREFIX_CACHING": "0"}, True),
        ([], {"MOMASERVE_NO_PREFIX_CACHING": "no"}, True),
        ([], {"MOMASERVE_NO_PREFIX_CACHING": ""}, True),
        (["--no-prefix-caching"], {"MOMASERVE_NO_PREFIX_CACHING": "0"}, False),
    ],
)
def test_prefix_caching_can_be_switched_off(
    words: list[str], environment: dict[str, str], expected: bool
) -> None:
    config = engine_config(parse_serve(words, environment))
    assert config.cache == CacheConfig(prefix_caching=expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOMASERVE_PORT", "eight"),
        ("MOMASERVE_DTYPE", "int4"),
        ("MOMASERVE_NO_PREFIX_CACHING", "maybe"),
    ],
)
def test_bad_environment_is_bad_usage_by_name(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_serve([], {name: value})
    assert end.value.code == 2
    assert f"{name}={value!r}" in capsys.readouterr().err


def test_options_that_repeat() -> None:
    words = "--api-key a --api-key b --cors-origin * --allow-image-host h --allow-image-host h:1"
    settings = server_settings(parse_serve(words.split()))
    assert settings.api_keys == ("a", "b")
    assert settings.cors_origins == ("*",)
    assert settings.allow_image_hosts == ("h", "h:1")
    environment = {"MOMASERVE_API_KEY": "c, d", "MOMASERVE_CORS_ORIGIN": "https://a.example"}
    settings = server_settings(parse_serve([], environment))
    assert (settings.api_keys, settings.cors_origins) == (("c", "d"), ("https://a.example",))
    assert server_settings(parse_serve(["--api-key", "a"], environment)).api_keys == ("a",)


@pytest.mark.parametrize("value", [",", "sk-a,,sk-b", "sk-a, "])
def test_an_empty_key_in_the_environment_opens_nothing(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_serve([], {"MOMASERVE_API_KEY": value})
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert "MOMASERVE_API_KEY" in shown
    assert "sk-" not in shown


def test_keys_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the team\n\n  sk-a  \nsk-b\r\n#sk-c\n")
    args = parse_serve(["--api-key-file", str(file), "--api-key", "sk-d"])
    assert sorted(server_settings(args).api_keys) == ["sk-a", "sk-b", "sk-d"]
    assert server_settings(parse_serve([], {"MOMASERVE_API_KEY_FILE": str(file)})).api_keys == (
        "sk-a",
        "sk-b",
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), (b"", "no key"), (b"# none\n\n", "no key"), (b"\xff\n", "ASCII")],
)
def test_key_files_that_are_no_use_are_named(
    content: bytes | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["serve", "--api-key-file", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert why in line


def test_help_shows_no_value_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOMASERVE_API_KEY", "sk-secret")
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--api-key KEY" in shown
    assert "sk-secret" not in shown


def test_left_out_checkpoint_is_the_demo() -> None:
    assert model_source(parse_serve([])) == CHECKPOINT
    assert (CHECKPOINT / "config.json").is_file()
    assert model_source(parse_serve(["here"])) == Path("here")


def test_preset_stands_in_for_a_checkpoint() -> None:
    words = ["--preset", "moma-90m-4t4i", "--random-weights"]
    assert model_source(parse_serve(words)) == "moma-90m-4t4i"
    for wrong in (words[:2], words[2:], ["here", *words]):
        with pytest.raises(ConfigError):
            model_source(parse_serve(wrong))


class FakeLLM:
    """Records what it is asked, answers with text and pictures."""

    asked: tuple[Any, SamplingParams]

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def generate(self, prompt: Any, params: SamplingParams) -> list[RequestResult]:
        FakeLLM.asked = (prompt, params)
        parts: list[str | Image.Image] = ["an apple", Image.new("RGB", (8, 8), "red")]
        choices = [ChoiceResult(parts=list(parts)) for _ in range(params.n)]
        return [RequestResult(prompt_token_ids=(0,), choices=choices)]


def generate_with(
    monkeypatch: pytest.MonkeyPatch, *words: str, defaults: GenerationDefaults | None = None
) -> int:
    engine = FakeEngine(defaults=defaults or GenerationDefaults())
    monkeypatch.setattr(generate, "LLM", FakeLLM)
    monkeypatch.setattr(Engine, "load", lambda checkpoint, config: engine)
    return cli.main(["generate", *words])


def test_generate_prints_text_and_writes_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.png").write_bytes(png())
    out = tmp_path / "out.png"
    words = ["--prompt", "apple", "--image", str(tmp_path / "in.png"), "--mode", "interleaved"]
    words += ["--seed", "4", "--n", "2", "--temperature", "0.5", "--image-top-k", "3"]
    words += ["--guidance-scale", "3", "--min-tokens", "2", "--max-tokens", "90"]
    words += ["--repetition-penalty", "1.5", "--presence-penalty", "-1"]
    words += ["--frequency-penalty", "0.5"]
    assert generate_with(monkeypatch, *words, "--out", str(out)) == 0
    shown = capsys.readouterr()
    assert shown.out == "an apple\nan apple\n"
    assert shown.err.splitlines() == [f"wrote {tmp_path}/out-{i}.png" for i in (1, 2)]
    assert Image.open(tmp_path / "out-2.png").getpixel((0, 0)) == (255, 0, 0)
    prompt, params = FakeLLM.asked
    assert isinstance(prompt[0], Image.Image)
    assert prompt[1] == "apple"
    assert (params.mode, params.seed, params.n) == (OutputMode.INTERLEAVED, 4, 2)
    assert (params.text.temperature, params.image.top_k) == (0.5, 3)
    assert (params.guidance_scale, params.min_tokens, params.max_tokens) == (3.0, 2, 90)
    assert (params.repetition_penalty, params.presence_penalty) == (1.5, -1.0)
    assert params.frequency_penalty == 0.5


def test_generate_takes_the_checkpoints_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = GenerationDefaults(image=Distribution(top_k=7), guidance_scale=2.5)
    assert generate_with(monkeypatch, "--prompt", "apple", defaults=defaults) == 0
    assert FakeLLM.asked[1] == SamplingParams(image=Distribution(top_k=7), guidance_scale=2.5)


def test_generate_fails_when_the_engine_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate_badly(self: FakeLLM, prompt: Any, params: SamplingParams) -> list[RequestResult]:
        choice = ChoiceResult(finish_reason=FinishReason.ERROR, error="out of luck")
        return [RequestResult(prompt_token_ids=(0,), choices=[choice])]

    monkeypatch.setattr(FakeLLM, "generate", generate_badly)
    assert generate_with(monkeypatch, "--prompt", "x") == 1
    assert capsys.readouterr().err == "momaserve generate: error: out of luck\n"


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    assert save_pictures([], tmp_path / "a.png") == []
    assert save_pictures([picture], tmp_path / "a.png") == [tmp_path / "a.png"]
    assert save_pictures([picture], tmp_path) == [tmp_path / "momaserve.png"]
    with pytest.raises(OutputError, match=r"no/a\.png cannot be written"):
        save_pictures([picture], tmp_path / "no" / "a.png")
    (tmp_path / "b.png").mkdir()
    (tmp_path / "b.png" / "momaserve.png").mkdir()
    with pytest.raises(OutputError):
        save_pictures([picture], tmp_path / "b.png")
    assert {path.name for path in tmp_path.rglob("*")} == {"a.png", "b.png", "momaserve.png"}


def test_unreadable_pictures_name_their_file(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name in ("bad.png", "missing.png"):
        with pytest.raises(PromptError, match=str(tmp_path / name)):
            read_picture(tmp_path / name)


def test_generate_takes_the_ablation_policy() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--prompt", "x", "--routing", "threshold"])
    assert engine_config(args).routing is RoutingPolicy.THRESHOLD


def test_the_documentation_names_only_options_that_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    operating = text.partition("\n## Operating\n")[2]
    flags = {option.flag for option in SERVE_OPTIONS} | {"--help", "--config"}
    named = set(re.findall(r"--[a-z][a-z-]+", operating))
    assert named <= flags
    limits = {option.flag for option in SERVE_OPTIONS if option.dest.startswith("max_")}
    assert limits - {"--max-model-len", "--max-num-requests", "--max-num-step-tokens"} <= named
    for line in operating.splitlines():
        flag, _, rest = line.removeprefix("| `").partition("` |")
        option = next(
            (o for o in SERVE_OPTIONS if line.startswith("| `--") and o.flag == flag), None
        )
        if option is not None and option.default_text().isdigit():
            assert rest.rpartition("| ")[2].split()[0].strip(",") == option.default_text()
