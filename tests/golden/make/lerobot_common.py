# ruff: noqa: E402
"""What the two LeRobot scripts share: inputs, statistics, the reference's answers, and the files that are written."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
import shim  # noqa: F401
import torch
from fill import fill
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

GOLDEN = HERE.parents[1]
CAMERAS = ("observation.images.front", "observation.images.side")
TASKS = ["pick up the bowl", "Open the drawer of the cabinet", "push_the button"]
STATE, ACTION, CHUNK = 5, 4, 6


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {
        name: torch.randint(0, 256, (3, 3, 24, 40), generator=generator, dtype=torch.uint8).float() / 255
        for name in CAMERAS
    }
    out["observation.state"] = torch.randn(3, STATE, generator=generator) * 0.5
    return out


def statistics() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, size in (("action", ACTION), ("observation.state", STATE)):
        middle, half = torch.randn(size, generator=generator) * 0.1, 0.2 + torch.rand(size, generator=generator)
        found[name] = {"mean": middle, "std": half, "min": middle - half, "max": middle + half}
        found[name] |= {"q01": middle - half, "q99": middle + half}
    return found


def fill_policy(policy: torch.nn.Module) -> None:
    state = policy.state_dict()
    policy.load_state_dict({k: torch.from_numpy(fill(k, v.shape)).to(v) for k, v in state.items()})


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(GOLDEN / "flow/tokenizer.json")),
        pad_token="<pad>",
        add_prefix_space=True,
    )


def answers(policy: torch.nn.Module, batch: dict[str, torch.Tensor], steps: str) -> dict[str, torch.Tensor]:
    """Actions for a given noise, the training loss, and one chunk that goes on from another (real-time chunking)."""
    generator = torch.Generator().manual_seed(2)
    width = policy.config.max_action_dim
    noise = torch.randn(3, CHUNK, width, generator=generator)
    out = {"noise": noise, "actions": policy.predict_action_chunk(dict(batch), noise=noise)}
    time = torch.tensor([0.2, 0.55, 0.9])
    wanted = torch.randn(3, CHUNK, ACTION, generator=generator)
    out |= {"loss.time": time, "loss.actions": wanted}
    with torch.no_grad():
        model, given = policy.model, dict(batch)
        images, masks = (policy._preprocess_images if steps == "pi" else policy.prepare_images)(given)
        words = (given["observation.language.tokens"], given["observation.language.attention_mask"])
        padded = torch.nn.functional.pad(wanted, (0, width - ACTION))
        state = [] if policy.name == "pi05" else [policy.prepare_state(given)]
        out["loss"] = model.forward(images, masks, *words, *state, padded, noise, time)
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=5, max_guidance_weight=10.0)
    policy.init_rtc_processor()
    policy.model.rtc_processor = policy.rtc_processor
    previous = torch.randn(3, 4, ACTION, generator=generator)
    out["rtc.previous"] = previous
    out["rtc.actions"] = policy.predict_action_chunk(
        dict(batch), noise=noise, inference_delay=1, prev_chunk_left_over=previous, execution_horizon=5
    )
    policy.config.rtc_config = None
    return out


def write(name: str, policy: torch.nn.Module, processors: tuple, found: dict[str, torch.Tensor]) -> None:
    """LeRobot's own files without the weights, whose names and shapes are listed instead, and the answers."""
    folder = GOLDEN / "flow" / name
    policy.config.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    shapes = {k: list(v.shape) for k, v in policy.state_dict().items()}
    (folder / "shapes.json").write_text(json.dumps(shapes))
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "io.safetensors")
