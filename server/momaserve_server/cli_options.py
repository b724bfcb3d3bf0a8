"""Options of `serve` and `generate`, their environment variables, and what they build.

Imports neither torch nor fastapi: `--help` must be quick.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from momaserve.config import (
    PROMPT_POLICIES,
    SERVABLE_POLICIES,
    CacheConfig,
    EngineConfig,
    RoutingPolicy,
    SchedulerConfig,
)
from momaserve.demo import CHECKPOINT
from momaserve.errors import ConfigError
from momaserve_server.settings import ServerSettings

ENVIRONMENT_PREFIX = "MOMASERVE_"
SWITCH_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
"""What the environment variable of an option without value may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One command-line option that sets one field of a configuration class."""

    flag: str
    owner: type
    """The dataclass whose default is the option's."""
    help: str
    """Without the default, with the unit."""
    field: str = ""
    """Field of `owner`; left out, the flag's own name."""
    type: Callable[[str], Any] = int
    choices: Sequence[str] | None = None
    unset: str = "automatic"
    """What the help shows for a default of None."""
    sets: bool | None = None
    """What the bare flag sets the field to; None for an option that takes a value."""

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def target(self) -> str:
        return self.field or self.dest

    @property
    def environment_name(self) -> str:
        return ENVIRONMENT_PREFIX + self.dest.upper()

    def default_text(self) -> str:
        if self.sets is not None:
            return "off"
        default = next(f.default for f in fields(self.owner) if f.name == self.target)
        return self.unset if default is None or default is MISSING else str(default)


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
    Option(flag="--threads", owner=EngineConfig, help="CPU threads of torch", unset="torch's own"),
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
        flag="--served-model-name",
        owner=ServerSettings,
        type=str,
        help="name of the model in requests",
        unset="the checkpoint's",
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
    Option(
        flag="--worker-threads",
        owner=ServerSettings,
        help="threads for tokenising and rendering pictures",
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
    """Adds `options`; each takes its default from its environment variable, if that is set."""
    group = parser.add_argument_group(
        "settings", f"each also as an environment variable, such as {options[0].environment_name}"
    )
    for option in options:
        kind: dict[str, Any] = {"action": "store_const", "const": option.sets}
        if option.sets is None:
            metavar = None if option.choices else "N" if option.type is not str else "NAME"
            kind = {"type": option.type, "choices": option.choices, "metavar": metavar}
        group.add_argument(
            option.flag,
            default=_from_environment(parser, option, environment),
            help=f"{option.help} (default: {option.default_text()})",
            **kind,
        )


def _from_environment(
    parser: argparse.ArgumentParser, option: Option, environment: Mapping[str, str] | None
) -> Any:
    text = (os.environ if environment is None else environment).get(option.environment_name)
    if not text:
        return None
    if option.sets is not None:
        if text.lower() not in SWITCH_WORDS:
            words = ", ".join(SWITCH_WORDS)
            parser.error(f"{option.environment_name}={text!r} is not one of {words}")
        return option.sets if SWITCH_WORDS[text.lower()] else None
    try:
        value = option.type(text)
    except ValueError:
        parser.error(f"{option.environment_name}={text!r} is not a valid {option.type.__name__}")
    if option.choices is not None and value not in option.choices:
        parser.error(
            f"{option.environment_name}={text!r} is not one of {', '.join(option.choices)}"
        )
    return value


def _given(args: argparse.Namespace, options: Sequence[Option], owner: type) -> dict[str, Any]:
    values = {o.target: getattr(args, o.dest, None) for o in options if o.owner is owner}
    return {name: value for name, value in values.items() if value is not None}


def checkpoint_path(args: argparse.Namespace) -> Path:
    path: Path | None = args.checkpoint
    return CHECKPOINT if path is None else path


def model_source(args: argparse.Namespace) -> Path | str:
    """The checkpoint's directory, or the name of a preset.

    Raises:
        ConfigError: arguments that contradict each other.
    """
    preset: str | None = args.preset
    if (preset is not None) != args.random_weights:
        raise ConfigError("--preset and --random-weights go together")
    if preset is None:
        return checkpoint_path(args)
    if args.checkpoint is not None:
        raise ConfigError(f"give CHECKPOINT {args.checkpoint} or --preset, not both")
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
