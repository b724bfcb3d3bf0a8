"""Convolutional autoencoder with finite scalar quantisation: pixels <-> image codes.

Knows tensors only; pictures as files or PIL images belong to `momaserve.tokens.image`.
`image_tokenizer/config.json` of a checkpoint holds the fields of `ImageTokenizerConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momaserve.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenizerConfig:
    """Shape of the autoencoder.

    The encoder first makes every `patch_size` x `patch_size` pixels one position by pixel
    unshuffling, and then halves the resolution once per further entry of `encoder_channels`;
    the decoder mirrors it. Patches of 2 and three entries make a picture of 64 x 64 pixels into
    8 x 8 codes; patches of 3 and two entries make 72 x 72 pixels into 12 x 12.
    """

    model_type: str = "fsq"
    image_size: int = 64
    """Height and width of a picture in pixels."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Quantisation levels per latent dimension; their product is the number of codes."""
    patch_size: int = 2
    """Pixels along one axis that the first and the last layer take together."""
    encoder_channels: tuple[int, ...] = (32, 64, 128)
    """Channels at 1/patch_size of the resolution, then at half of that, and so on."""
    decoder_channels: tuple[int, ...] = (48, 96, 192)
    """The same for the decoder."""
    blocks_per_stage: int = 2
    """Residual blocks of the decoder at each resolution (the encoder has half, at least 1)."""

    def __post_init__(self) -> None:
        if self.model_type != "fsq":
            raise CheckpointError(
                f"image tokenizer: model_type must be 'fsq', got {self.model_type!r}"
            )
        for name in ("levels", "encoder_channels", "decoder_channels"):
            values = getattr(self, name)
            ok = isinstance(values, tuple) and all(type(v) is int and v > 0 for v in values)
            if not ok or not values:
                raise CheckpointError(
                    f"image tokenizer: {name} must be positive integers, got {values!r}"
                )
        for name in ("image_size", "patch_size", "blocks_per_stage"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"image tokenizer: {name} must be a positive integer, got {value!r}"
                )
        if len(self.encoder_channels) != len(self.decoder_channels):
            raise CheckpointError(
                "image tokenizer: encoder_channels and decoder_channels differ in length: "
                f"{len(self.encoder_channels)} and {len(self.decoder_channels)}"
            )
        if self.image_size % self.downsampling:
            raise CheckpointError(
                f"image tokenizer: image_size {self.image_size} is not a multiple of "
                f"{self.downsampling}"
            )
        if min(self.levels) < 2:
            raise CheckpointError(f"image tokenizer: levels must be >= 2, got {self.levels}")

    @property
    def downsampling(self) -> int:
        """Pixels per code along one axis."""
        return self.patch_size << (len(self.encoder_channels) - 1)

    @property
    def grid_size(self) -> int:
        """Codes along one axis."""
        return self.image_size // self.downsampling

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageTokenizerConfig:
        """Raises CheckpointError for unknown keys."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise CheckpointError(f"image_tokenizer/config.json: unknown keys {unknown}")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class FiniteScalarQuantizer(nn.Module):
    """Rounds each latent dimension to one of a few levels (Mentzer et al., 2309.15505)."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Squash z [..., d] so that rounding gives exactly `levels` values per dimension."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def forward(self, z: Tensor) -> Tensor:
        """z [..., d] -> quantised values in [-1, 1], gradient passed straight through."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2)

    def distance(self, z: Tensor, quantised: Tensor) -> Tensor:
        """How far z is from values that `forward` gave, in levels; above 0.5 the code differs."""
        return (self.bound(z) - quantised * (self.levels // 2)).abs()

    def to_codes(self, z: Tensor) -> Tensor:
        """z [..., d] -> code numbers [...]."""
        digits = self.bound(z).round().long() + self.levels // 2
        return (digits * self.basis).sum(-1)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Code numbers [...] -> quantised values [..., d] as `forward` gives them."""
        digits = codes.unsqueeze(-1) // self.basis % self.levels
        half = self.levels // 2
        return (digits - half).float() / half


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(F.silu(self.conv1(F.silu(x))))
        return x + h


def _encoder(config: ImageTokenizerConfig) -> nn.Sequential:
    channels = config.encoder_channels
    blocks = max(1, config.blocks_per_stage // 2)
    inputs = 3 * config.patch_size**2
    layers: list[nn.Module] = [
        nn.PixelUnshuffle(config.patch_size),
        nn.Conv2d(inputs, channels[0], 3, padding=1),
    ]
    for i, width in enumerate(channels):
        if i:
            layers.append(nn.Conv2d(channels[i - 1], width, 4, stride=2, padding=1))
        layers += [ResidualBlock(width) for _ in range(blocks)]
    layers += [nn.SiLU(), nn.Conv2d(channels[-1], len(config.levels), 1)]
    return nn.Sequential(*layers)


def _decoder(config: ImageTokenizerConfig) -> nn.Sequential:
    channels = config.decoder_channels[::-1]
    layers: list[nn.Module] = [nn.Conv2d(len(config.levels), channels[0], 3, padding=1)]
    for i, width in enumerate(channels):
        if i:
            layers += [nn.Conv2d(channels[i - 1], 4 * width, 1), nn.PixelShuffle(2)]
        layers += [ResidualBlock(width) for _ in range(config.blocks_per_stage)]
    outputs = 3 * config.patch_size**2
    layers += [
        nn.SiLU(),
        nn.Conv2d(channels[-1], outputs, 3, padding=1),
        nn.PixelShuffle(config.patch_size),
    ]
    return nn.Sequential(*layers)


class ImageAutoencoder(nn.Module):
    """Encoder, quantiser and decoder. Pixels are RGB floats in [-1, 1], [B, 3, S, S]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.quantizer = FiniteScalarQuantizer(config.levels)
        self.decoder = _decoder(config)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction of `pixels` and its quantised latents [B, s, s, d], differentiable."""
        quantised: Tensor = self.quantizer(self.latents(pixels))
        out: Tensor = self.decoder(quantised.permute(0, 3, 1, 2).contiguous())
        return out, quantised

    def latents(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> what is quantised, [B, s, s, d]."""
        z: Tensor = self.encoder(pixels)
        return z.permute(0, 2, 3, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> codes [B, N] in raster order."""
        return self.quantizer.to_codes(self.latents(pixels)).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N] in raster order -> pixels [B, 3, S, S] clamped to [-1, 1]."""
        side = self.config.grid_size
        z = self.quantizer.from_codes(codes.view(-1, side, side))
        pixels: Tensor = self.decoder(z.permute(0, 3, 1, 2).contiguous())
        return pixels.clamp(-1, 1)
