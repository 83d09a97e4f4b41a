"""Vision towers: what the robot sees becomes patch features; a wrong scale or order is invisible in the code above.

Pinned: pixel preparation against its formula, shapes for one and several cameras, that the instruction reaches the
small tower's features and its own row only, what is refused. The fused tower's features are pinned by test_parity.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.layers.vision import FilmConv, FusedDinoSiglip, VisionTower, make_tower

FILM: dict[str, Any] = {"image_size": 32, "channels": [8, 8, 16, 16], "text": 12}
FUSED: dict[str, Any] = {
    "image_size": 28,
    "patch": 14,
    "dino_width": 8,
    "dino_depth": 2,
    "dino_heads": 2,
    "dino_hidden": 16,
    "registers": 4,
    "siglip_width": 12,
    "siglip_depth": 2,
    "siglip_heads": 2,
    "siglip_hidden": 16,
}


def tower(kind: str) -> VisionTower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_tower(kind, FILM if kind == "film_conv" else FUSED)


def images(size: int, views: int) -> Tensor:
    return torch.randint(
        0, 256, (2, views, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


@pytest.mark.parametrize("kind", ["film_conv", "fused_dinov2_siglip"])
def test_cameras_stand_one_after_another(kind: str) -> None:
    made = tower(kind)
    assert isinstance(made.image_size, int)
    seen = images(made.image_size, 2)
    text = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    both = made(made.prepare(seen), text)
    assert both.shape == (2, 2 * made.patches, made.features)
    for view in range(2):
        alone = made(made.prepare(seen[:, view : view + 1]), text)
        part = both[:, view * made.patches : (view + 1) * made.patches]
        assert torch.allclose(part, alone, atol=1e-5)
    assert not torch.allclose(both[:, : made.patches], both[:, made.patches :], atol=1e-3)


def test_the_small_towers_pixels_are_in_one_range() -> None:
    made = tower("film_conv")
    levels = torch.tensor([0, 255], dtype=torch.uint8)[None, None, :, None, None].expand(1, 1, 2, 1, 3)
    assert made.prepare(levels).flatten().unique().tolist() == [-1.0, 1.0]


def test_coordinates_tell_patches_apart_where_images_do_not() -> None:
    """In the middle of an image of one colour, where no patch sees the padding of the border."""
    grey = torch.full((1, 1, 256, 256, 3), 90, dtype=torch.uint8)
    text = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    spreads = []
    for coordinates in (False, True):
        torch.manual_seed(0)
        made = make_tower("film_conv", FILM | {"image_size": 256, "coordinates": coordinates})
        assert isinstance(made, FilmConv)
        with torch.no_grad():
            made.position.zero_()
            patches = made(made.prepare(grey), text).reshape(16, 16, -1)[6:10, 6:10].flatten(0, 1)
        spreads.append(float(patches.std(0).mean()))
    assert spreads[0] < 1e-5
    assert spreads[1] > 0.01
    pixels = made.prepare(grey)
    assert pixels.shape == (1, 1, 5, 256, 256)
    assert pixels[0, 0, 3, 0, [0, -1]].tolist() == [-1, 1]  # x, along the row
    assert pixels[0, 0, 4, [0, -1], 0].tolist() == [-1, 1]  # y, down the column


def test_a_tower_without_coordinates_is_as_it_was() -> None:
    """Bases made without them load, and keep their hash: no tensor has another shape or value at the start."""
    made = tower("film_conv")
    assert isinstance(made, FilmConv)
    assert made.stem.weight.shape[1] == 3
    assert not made.position.any()


def test_the_fused_towers_pixels_are_normalised_twice() -> None:
    made = tower("fused_dinov2_siglip")
    seen = images(28, 1)
    pixels = made.prepare(seen)
    assert pixels.shape == (2, 1, 6, 28, 28)
    raw = seen[1, 0, 3, 5].double() / 255  # one pixel: R, G, B
    dino = (raw - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(pixels[1, 0, :3, 3, 5].double(), dino, atol=1e-5)
    assert torch.allclose(pixels[1, 0, 3:, 3, 5].double(), (raw - 0.5) / 0.5, atol=1e-5)


def test_the_instruction_modulates_features_of_its_own_row_only() -> None:
    made = tower("film_conv")
    pixels = made.prepare(images(32, 2))
    text = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    before = made(pixels, text)
    text[1] += 1.0
    after = made(pixels, text)
    assert torch.equal(before[0], after[0])
    share = float(((before[1] - after[1]).norm() / before[1].norm()).detach())
    assert share > 0.05


def test_every_stage_is_modulated() -> None:
    made = tower("film_conv")
    assert isinstance(made, FilmConv)
    pixels, text = made.prepare(images(32, 1)), torch.ones(2, 12)
    made(pixels, text).square().sum().backward()
    gradients = [parameter.grad for name, parameter in made.named_parameters() if name.endswith("film.weight")]
    assert len(gradients) == len(list(made.blocks.children()))
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_patches_are_seen_where_they_are() -> None:
    made = tower("fused_dinov2_siglip")
    seen = images(28, 1)
    changed = seen.clone()
    changed[:, :, :14, 14:] = 0  # the second patch, reading order
    pixels, other = made.prepare(seen), made.prepare(changed)
    assert isinstance(made, FusedDinoSiglip)
    one, two = (made.featurizer.patch_embed(p.flatten(0, 1)[:, :3]) for p in (pixels, other))
    moved = (one - two).abs().sum((0, 2)) > 0
    assert moved.tolist() == [False, True, False, False]


def test_unknown_towers_and_options_are_refused() -> None:
    with pytest.raises(RatchetError) as refused:
        make_tower("resnet", {})
    assert refused.value.code == "policy.unknown_vision_tower"
    for options in ({**FILM, "depth": 3}, {"image_size": 32}):
        with pytest.raises(RatchetError) as refused:
            make_tower("film_conv", options)
        assert refused.value.code == "policy.bad_config"


def test_tensors_that_no_feature_depends_on_are_known() -> None:
    made = tower("fused_dinov2_siglip")
    assert isinstance(made, FusedDinoSiglip)
    for key in ("fused_featurizer.attn_pool.q.weight", "featurizer.norm.bias", "featurizer.blocks.1.norm1.weight"):
        assert made.unused(f".vision_backbone.{key}")
    for key in ("featurizer.blocks.0.norm1.weight", "featurizer.pos_embed", "fused_featurizer.blocks.0.mlp.fc1.bias"):
        assert not made.unused(f".vision_backbone.{key}")
