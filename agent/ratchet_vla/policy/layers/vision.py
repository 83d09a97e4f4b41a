"""Vision towers: images in, patch features out; each a named component of the VLA.

Knows pixels, their preparation and two architectures. Knows no language model and no action.
`fused_dinov2_siglip` is the published 7B model's pair of ViTs under its own parameter names (timm's);
`film_conv` is a small convolutional stem that the instruction modulates at every stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.configuration import tuples_for_lists


class VisionTower(nn.Module):
    """One tower. features: width of a patch feature; patches: per image."""

    features: int
    patches: int

    def prepare(self, images: Tensor) -> Tensor:
        """(B, V, H, W, 3) uint8 -> pixels in the tower's own form."""
        raise NotImplementedError  # abstract

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Pixels and (B, d) text vector -> (B, V * patches, features)."""
        raise NotImplementedError  # abstract


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, scaled: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width, hidden)
        self.ls1 = _Scale(width) if scaled else nn.Identity()
        self.ls2 = _Scale(width) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class _ViT(nn.Module):
    """A ViT up to its second-to-last block, the features the VLA takes; the last block and the norm are never run."""

    def __init__(
        self, width: int, depth: int, heads: int, hidden: int, patches: int, patch: int, registers: int, dino: bool
    ) -> None:
        super().__init__()
        self.prefix = (1 + registers) if dino else 0
        self.checkpointing = False  # as in trunk.Llama
        self.patch_embed = _PatchEmbed(width, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, width))
        if dino:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, hidden, dino) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        if self.prefix:
            b = len(x)
            x = torch.cat([self.cls_token.expand(b, -1, -1), self.reg_token.expand(b, -1, -1), x], 1)
        for block in self.blocks:
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x[:, self.prefix :]


class FusedDinoSiglip(VisionTower):
    """DINOv2 (register tokens, layer scale) and SigLIP side by side; features concatenated."""

    MEAN = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
    STD = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
    # In the published files, but no feature depends on them.
    UNUSED = (".attn_pool.", ".norm.")

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        dino_width: int,
        dino_depth: int,
        dino_heads: int,
        dino_hidden: int,
        registers: int,
        siglip_width: int,
        siglip_depth: int,
        siglip_heads: int,
        siglip_hidden: int,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patches = (image_size // patch) ** 2
        self.features = dino_width + siglip_width
        self.depths = {"featurizer": dino_depth, "fused_featurizer": siglip_depth}
        self.featurizer = _ViT(
            dino_width, dino_depth, dino_heads, dino_hidden, self.patches, patch, registers, dino=True
        )
        self.fused_featurizer = _ViT(
            siglip_width, siglip_depth, siglip_heads, siglip_hidden, self.patches, patch, 0, dino=False
        )

    def unused(self, key: str) -> bool:
        """True for tensors of published files that no feature depends on."""
        if any(part in key for part in self.UNUSED) and ".blocks." not in key:
            return True
        return any(f".{tower}.blocks.{depth - 1}." in f".{key}" for tower, depth in self.depths.items())

    def prepare(self, images: Tensor) -> Tensor:
        """(B, V, H, W, 3) uint8 -> (B, V, 6, H, W) float32: normalised for DINOv2, then for SigLIP."""
        x = images.permute(0, 1, 4, 2, 3).float() / 255
        both = []
        for mean, std in zip(self.MEAN, self.STD, strict=True):
            m, s = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
            both.append((x - m) / s)
        return torch.cat(both, 2)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        b, v = pixels.shape[:2]
        flat = pixels.flatten(0, 1)
        patches = torch.cat([self.featurizer(flat[:, :3]), self.fused_featurizer(flat[:, 3:])], 2)
        return patches.reshape(b, v * self.patches, self.features)


class _FilmBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, text: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.film = nn.Linear(text, 2 * channels)
        self.skip = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = functional.gelu(self.norm1(self.conv1(x)))
        scale, offset = self.film(text)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv2(h)) * (1 + scale) + offset
        return functional.gelu(h + self.skip(x))


class FilmConv(VisionTower):
    """Convolutional stem with FiLM (Perez et al., arXiv 1709.07871) from the instruction at every stage; stride 16.

    coordinates: the stem also takes each pixel's x and y (Liu et al., arXiv 1807.03247) and patches start with distinct
        position embeddings. Without either a short training never learns where things are.
    """

    def __init__(self, *, image_size: int, channels: tuple[int, ...], text: int, coordinates: bool = False) -> None:
        super().__init__()
        self.image_size = image_size
        self.coordinates = coordinates
        self.patches = (image_size // 16) ** 2
        self.features = channels[-1]
        self.stem = nn.Conv2d(5 if coordinates else 3, channels[0], 4, 4)
        strides = [2, 2] + [1] * (len(channels) - 3)
        self.blocks = nn.ModuleList(
            _FilmBlock(a, b, text, s) for a, b, s in zip(channels, channels[1:], strides, strict=False)
        )
        distinct = torch.randn if coordinates else torch.zeros
        self.position = nn.Parameter(0.5 * distinct(self.patches, channels[-1]))

    def prepare(self, images: Tensor) -> Tensor:
        """(B, V, H, W, 3) uint8 -> (B, V, 3, H, W) float32 in [-1, 1]; with coordinates two channels more, x and y from
        -1 at the left and top to 1."""
        pixels = images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        if not self.coordinates:
            return pixels
        b, v, _, h, w = pixels.shape
        x = torch.linspace(-1, 1, w, device=pixels.device).expand(b, v, 1, h, w)
        y = torch.linspace(-1, 1, h, device=pixels.device)[:, None].expand(b, v, 1, h, w)
        return torch.cat([pixels, x, y], 2)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        b, v = pixels.shape[:2]
        x = self.stem(pixels.flatten(0, 1))
        text = text.repeat_interleave(v, 0)
        for block in self.blocks:
            x = block(x, text)
        x = x.flatten(2).transpose(1, 2) + self.position
        out: Tensor = x.reshape(b, v * self.patches, self.features)
        return out


TOWERS: dict[str, type[VisionTower]] = {"fused_dinov2_siglip": FusedDinoSiglip, "film_conv": FilmConv}


def make_tower(kind: str, options: Mapping[str, Any]) -> VisionTower:
    """Raises RatchetError policy.unknown_vision_tower, policy.bad_config for options that the tower does not have."""
    if kind not in TOWERS:
        raise RatchetError(
            "policy.unknown_vision_tower", f"no vision tower '{kind}'", fix=f"one of {', '.join(TOWERS)}"
        )
    try:
        return TOWERS[kind](**tuples_for_lists(options))
    except TypeError as error:
        raise RatchetError("policy.bad_config", f"vision_options: {error}", where=kind) from None
