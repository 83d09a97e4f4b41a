"""Image preparation against what the published code's own library computes.

The path matters because a model sees nothing wrong in a slightly different image; it just does worse. Pinned:
TensorFlow's JPEG, Lanczos-3 and crop to the grey level (tests/golden/images), the geometry of padding, and what is
refused. Determinism: fixed files and closed forms.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.images import OPENVLA, PLAIN_BICUBIC, Preparation, prepare
from tests.agent.policy import samples

GOLDEN = samples.ROOT / "tests/golden/images/tensorflow.safetensors"


def grey(image: Tensor, size: int, how: Preparation) -> Tensor:
    """One (H, W, 3) uint8 image, prepared, as (size, size, 3) grey levels."""
    return prepare(image[None, None], size, how)[0, 0].permute(1, 2, 0) * 255


@pytest.mark.parametrize("case", ["square", "wide", "small"])
def test_jpeg_resampling_and_crop_are_tensorflows(case: str) -> None:
    golden = load_file(GOLDEN)
    camera = golden[f"{case}.camera"]
    resized = grey(camera, 56, Preparation("lanczos3", jpeg=True))
    assert float((resized - golden[f"{case}.resized"]).abs().max()) < 1e-3
    difference = (grey(camera, 56, OPENVLA) - golden[f"{case}.cropped"]).abs()
    assert float(difference.max()) <= 1.001  # one grey level, where rounding falls on a border
    assert float((difference > 0.5).float().mean()) < 1e-3
    # Leaving out one of the steps is far outside.
    for wrong in (Preparation("lanczos3", crop=0.9), Preparation("lanczos3", jpeg=True), PLAIN_BICUBIC):
        assert float((grey(camera, 56, wrong) - golden[f"{case}.cropped"]).abs().max()) > 5


def test_an_image_of_the_right_size_is_not_encoded_again() -> None:
    image = torch.randint(0, 256, (56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grey(image, 56, Preparation("lanczos3", jpeg=True)).round(), image.float())


def test_padding_keeps_proportions_and_says_where_the_bars_are() -> None:
    image = torch.full((20, 40, 3), 255, dtype=torch.uint8)
    corner = grey(image, 40, Preparation("pad_corner"))
    assert float(corner[:20].max()) == 0
    assert float(corner[20:].min()) == 255
    centre = grey(image, 40, Preparation("pad_centre"))
    assert float(centre[:10].max()) == float(centre[30:].max()) == 0
    assert float(centre[10:30].min()) == 255
    tall = grey(image.transpose(0, 1), 40, Preparation("pad_corner"))
    assert float(tall[:, :20].max()) == 0


def test_what_is_refused() -> None:
    with pytest.raises(RatchetError) as refused:
        prepare(torch.zeros(1, 1, 20, 20, 3, dtype=torch.uint8), 24, Preparation())
    assert refused.value.code == "policy.bad_input"
    for wrong in ({"resize": "nearest"}, {"crop": 0.0}, {"crop": 1.5}, {"flip": True}):
        with pytest.raises(RatchetError) as refused:
            Preparation.of(wrong)
        assert refused.value.code == "policy.bad_config"


def test_a_policy_prepares_what_its_camera_gives() -> None:
    """Any camera size goes in, and what comes out is what the prepared image gives."""
    how = {"resize": "bicubic"}
    policy, exact = samples.policy(images=how), samples.policy()
    batch = samples.batch(policy)
    large = torch.randint(0, 256, (3, 1, 50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch.images = large
    prepared = (prepare(large, 32, PLAIN_BICUBIC) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
    with pytest.raises(RatchetError):
        exact.predict(batch)
    got = policy.logits(batch)
    batch.images = prepared
    assert torch.equal(got, exact.logits(batch))
    assert policy.base_hash != exact.base_hash  # another preparation is another model
