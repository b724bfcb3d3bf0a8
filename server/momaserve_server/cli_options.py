"""Options of `serve` and `generate`, and what they build.

A flag comes before its environment variable, that before the file of `--config`, and that before
the default.

Imports neither torch nor fastapi: `--help` must be quick.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from momaserve.config import (
    PROMPT_POLICIES,
    SERVABLE_POLICIES,
    CacheConfig,
    EngineConfig,
    RoutingPolicy,
    SchedulerConfig,
    Scheduling,
)
from momaserve.demo import CHECKPOINT
from momaserve.errors import ConfigError
from momaserve_server.api_keys import read_key_file
from momaserve_server.config_file import ConfigFile, read_config_file
from momaserve_server.option import ENVIRONMENT_PREFIX, Option
from momaserve_server.settings import LOG_FORMATS, LOG_LEVELS, ServerSettings

CONFIG_ENVIRONMENT_NAME = f"{ENVIRONMENT_PREFIX}CONFIG"

PROMPT_CHOICES = ("same", *map(str, PROMPT_POLICIES))

ENGINE_OPTIONS: tuple[Option, ...] = (
    Option(
        flag="--dtype",
        owner=EngineConfig,
        type=str,
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number format of the weights",
    ),
    Option(
        flag="--device",
        owner=EngineConfig,
        type=str,
        choices=("auto", "cpu", "cuda"),
        help="where the model runs",
    ),
    Option(
        flag="--backend",
        owner=EngineConfig,
        type=str,
        choices=("auto", "cpu", "triton", "xformers", "reference"),
        help="who computes: kernels for the CPU or the GPU, plain torch with the attention of "
        "xformers, or plain torch; auto takes the kernels of the device",
    ),
    Option(flag="--threads", owner=EngineConfig, help="CPU threads", unset="torch's own"),
    Option(
        flag="--plan-ahead",
        owner=EngineConfig,
        type=str,
        choices=("auto", "on", "off"),
        help="start a step before the one in flight is known",
        unset="auto: where the device runs beside the host",
    ),
    Option(
        flag="--max-model-len",
        owner=EngineConfig,
        help="longest prompt plus answer, in tokens",
        unset="the checkpoint's",
    ),
    Option(flag="--block-size", owner=CacheConfig, help="tokens per KV block; a power of two"),
    Option(
        flag="--kv-cache-bytes",
        owner=CacheConfig,
        help="memory for KV blocks, in bytes",
        unset="room for every running request, up to 1 GiB on a CPU",
    ),
    Option(
        flag="--no-prefix-caching",
        owner=CacheConfig,
        field="prefix_caching",
        sets=False,
        help="compute every prompt anew, even where requests begin alike",
    ),
    Option(
        flag="--max-num-requests", owner=SchedulerConfig, help="requests that run at the same time"
    ),
    Option(
        flag="--max-num-step-tokens", owner=SchedulerConfig, help="new tokens computed in one step"
    ),
    Option(flag="--max-queued-requests", owner=SchedulerConfig, help="requests that may wait"),
    Option(
        flag="--max-queued-tokens",
        owner=SchedulerConfig,
        help="prompt tokens of all waiting requests together",
    ),
    Option(
        flag="--scheduling",
        owner=SchedulerConfig,
        type=str,
        choices=tuple(map(str, Scheduling)),
        help="which waiting request starts first: one that shares experts with those that run, "
        "or the oldest",
    ),
    Option(
        flag="--max-num-passes",
        owner=SchedulerConfig,
        help="younger requests of its priority that may start before a waiting one; "
        "router-aware only",
        unset="4 times --max-num-requests",
    ),
    Option(
        flag="--step-time-target-ms",
        owner=SchedulerConfig,
        type=float,
        help="predicted time, in milliseconds, that prompts fill a step up to while others "
        "decode; router-aware only",
        unset="none",
    ),
)

ROUTING_OPTION = Option(
    flag="--routing",
    owner=EngineConfig,
    type=str,
    choices=tuple(map(str, SERVABLE_POLICIES)),
    help="how tokens find their experts",
)
OFFLINE_ROUTING_OPTION = Option(
    flag="--routing",
    owner=EngineConfig,
    type=str,
    choices=(*map(str, SERVABLE_POLICIES), str(RoutingPolicy.THRESHOLD)),
    help="how tokens find their experts; 'threshold' is the ablation that breaks pictures",
)
PROMPT_ROUTING_OPTION = Option(
    flag="--prompt-routing",
    owner=EngineConfig,
    type=str,
    choices=PROMPT_CHOICES,
    help="the same for the tokens of prompts",
    unset="same",
)

SERVER_OPTIONS: tuple[Option, ...] = (
    Option(flag="--host", owner=ServerSettings, type=str, help="address to listen on"),
    Option(flag="--port", owner=ServerSettings, help="port to listen on; 0 takes a free one"),
    Option(
        flag="--root-path",
        owner=ServerSettings,
        type=str,
        metavar="PATH",
        help="path under which a proxy shows this server, such as /llm",
        unset="none",
    ),
    Option(
        flag="--served-model-name",
        owner=ServerSettings,
        type=str,
        help="name of the model in requests",
        unset="the checkpoint's",
    ),
    Option(
        flag="--api-key",
        owner=ServerSettings,
        field="api_keys",
        type=str,
        metavar="KEY",
        repeats=True,
        help="key without which the API answers with a 401; others on this machine may see it in "
        "the list of processes, unlike one in the environment or in a file",
        unset="none, open to everybody",
    ),
    Option(
        flag="--api-key-file",
        owner=ServerSettings,
        field="api_keys",
        type=read_key_file,
        metavar="FILE",
        help="file of such keys, one per line",
        unset="none",
    ),
    Option(
        flag="--cors-origin",
        owner=ServerSettings,
        field="cors_origins",
        type=str,
        metavar="ORIGIN",
        repeats=True,
        help="origin whose web pages may use the API, such as https://example.com, or *",
        unset="none",
    ),
    Option(
        flag="--drain-timeout",
        owner=ServerSettings,
        field="drain_timeout_s",
        type=float,
        help="seconds that running requests may take to finish after SIGTERM",
    ),
    Option(flag="--max-body-bytes", owner=ServerSettings, help="largest request body, in bytes"),
    Option(flag="--max-image-bytes", owner=ServerSettings, help="largest picture file, in bytes"),
    Option(
        flag="--max-image-pixels",
        owner=ServerSettings,
        help="largest width times height of a picture, in pixels",
    ),
    Option(
        flag="--max-images-per-request", owner=ServerSettings, help="pictures in one chat request"
    ),
    Option(
        flag="--max-prompts-per-request",
        owner=ServerSettings,
        help="prompts in one completions request",
    ),
    Option(flag="--max-n", owner=ServerSettings, help="answers to one prompt"),
    Option(
        flag="--max-output-tokens",
        owner=ServerSettings,
        help="longest answer, in tokens",
        unset="what the context has room for",
    ),
    Option(
        flag="--max-logprobs",
        owner=ServerSettings,
        help="likeliest tokens that log-probabilities are reported of",
    ),
    Option(flag="--max-stop", owner=ServerSettings, help="stop strings of one request"),
    Option(
        flag="--allow-image-host",
        owner=ServerSettings,
        field="allow_image_hosts",
        type=str,
        metavar="HOST",
        repeats=True,
        help="host, or host:port, from which pictures are fetched by http(s) URL",
        unset="none",
    ),
    Option(
        flag="--image-fetch-timeout",
        owner=ServerSettings,
        field="image_fetch_timeout_s",
        type=float,
        help="seconds that fetching one picture may take",
    ),
    Option(
        flag="--worker-threads",
        owner=ServerSettings,
        help="threads for tokenising and rendering pictures",
    ),
    Option(
        flag="--metrics-prefix",
        owner=ServerSettings,
        type=str,
        help="first word of all names in /metrics; vllm gives vLLM's own names",
    ),
    Option(
        flag="--shadow-eval",
        owner=ServerSettings,
        type=float,
        metavar="RATE",
        help="share of finished requests, 0 to 1, whose token ids are kept in memory until their "
        "routing was compared with expert choice, beside the engine; see /v1/router",
    ),
    Option(
        flag="--otlp-traces-endpoint",
        owner=ServerSettings,
        type=str,
        metavar="URL",
        help="where OpenTelemetry spans go, such as http://localhost:4318/v1/traces",
        unset="none",
    ),
    Option(
        flag="--no-warm-up",
        owner=ServerSettings,
        field="warm_up",
        sets=False,
        help="ready sooner, and the first requests wait for what is compiled at its first use",
    ),
    Option(
        flag="--log-format",
        owner=ServerSettings,
        type=str,
        choices=LOG_FORMATS,
        help="lines on stderr for people, or one JSON object per line",
    ),
    Option(
        flag="--log-level",
        owner=ServerSettings,
        type=str,
        choices=LOG_LEVELS,
        help="what is worth a line; debug shows health probes too",
    ),
    Option(
        flag="--no-access-log",
        owner=ServerSettings,
        field="access_log",
        sets=False,
        help="no line per request",
    ),
)

SERVE_OPTIONS = (*SERVER_OPTIONS, ROUTING_OPTION, PROMPT_ROUTING_OPTION, *ENGINE_OPTIONS)
GENERATE_OPTIONS = (OFFLINE_ROUTING_OPTION, PROMPT_ROUTING_OPTION, *ENGINE_OPTIONS)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint directory (default: the embedded demo)",
    )


def add_model_source(parser: argparse.ArgumentParser) -> None:
    """A checkpoint, or a preset that stands in for one."""
    add_checkpoint(parser)
    parser.add_argument("--preset", metavar="NAME", help="a named shape instead of a checkpoint")
    parser.add_argument(
        "--random-weights", action="store_true", help="fill the preset with random weights"
    )


def add_options(
    parser: argparse.ArgumentParser,
    options: Sequence[Option],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Adds `options` and `--config`; the environment's values are their defaults."""
    environment = os.environ if environment is None else environment
    group = parser.add_argument_group(
        "settings",
        f"each also as an environment variable, such as {options[0].environment_name} (several "
        "values with commas between them), and as a key of the file of --config",
    )

    def config_file(path: str) -> ConfigFile:
        try:
            return read_config_file(Path(path), options)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    group.add_argument(
        "--config",
        type=config_file,
        metavar="FILE",
        default=environment.get(CONFIG_ENVIRONMENT_NAME) or None,
        help="TOML file of settings; flags and environment variables come before it "
        "(default: none)",
    )
    for option in options:
        default: Any = None
        text = environment.get(option.environment_name)
        if text:
            try:
                default = option.from_environment(text)
            except ValueError as error:
                parser.error(str(error))
        option.add_to(group, default)


def _given(args: argparse.Namespace, options: Sequence[Option], owner: type) -> dict[str, Any]:
    """Values of the fields of `owner` that a flag, the environment or the file sets."""
    values: dict[str, Any] = {}
    for option in options:
        value = getattr(args, option.dest, None)
        if value is None:
            value = _from_file(args, option.dest)
        if option.owner is not owner or value is None:
            continue
        if isinstance(value, list | tuple):  # --api-key and --api-key-file fill one field
            value = (*values.get(option.target, ()), *value)
        values[option.target] = value
    return values


def _from_file(args: argparse.Namespace, name: str) -> Any:
    config: ConfigFile | None = getattr(args, "config", None)
    return None if config is None else config.values.get(name)


def checkpoint_path(args: argparse.Namespace) -> Path:
    path: Path | None = args.checkpoint
    return CHECKPOINT if path is None else path


def model_source(args: argparse.Namespace) -> Path | str:
    """The checkpoint's directory, or the name of a preset.

    What the file of `--config` says about it counts only if the command line says nothing.

    Raises:
        ConfigError: arguments that contradict each other.
    """
    checkpoint: Path | None = args.checkpoint
    preset: str | None = args.preset
    is_random: bool = args.random_weights
    if checkpoint is None and preset is None and not is_random:
        named: str | None = _from_file(args, "checkpoint")
        checkpoint = None if named is None else Path(named)
        preset = _from_file(args, "preset")
        is_random = bool(_from_file(args, "random_weights"))
    if (preset is not None) != is_random:
        raise ConfigError("--preset and --random-weights go together")
    if preset is None:
        return CHECKPOINT if checkpoint is None else checkpoint
    if checkpoint is not None:
        raise ConfigError(f"give CHECKPOINT {checkpoint} or --preset, not both")
    return preset


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """Raises ConfigError for a value that cannot work."""
    return ServerSettings(**_given(args, SERVER_OPTIONS, ServerSettings))


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Raises ConfigError for a value that cannot work."""
    values = _given(args, SERVE_OPTIONS, EngineConfig)
    prompt_routing = values.pop("prompt_routing", "same")
    routing = RoutingPolicy(values.pop("routing", RoutingPolicy.CAUSAL))
    plan_ahead = values.pop("plan_ahead", "auto")
    return EngineConfig(
        **values,
        routing=routing,
        plan_ahead=None if plan_ahead == "auto" else plan_ahead == "on",
        prompt_routing=None if prompt_routing == "same" else RoutingPolicy(prompt_routing),
        cache=CacheConfig(**_given(args, ENGINE_OPTIONS, CacheConfig)),
        scheduler=SchedulerConfig(**_given(args, ENGINE_OPTIONS, SchedulerConfig)),
    )
