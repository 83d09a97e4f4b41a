"""Golden pi0 and pi0.5: tiny LeRobot policies with weights from tests/golden/fill.py, their files and their answers.

Needs lerobot 0.6.1 and transformers 5.5.4. The published classes fix the sizes of PaliGemma, so its configuration is
shrunk as it passes. Writes tests/golden/flow/pi0 and tests/golden/flow/pi05.
"""

import types

import lerobot.policies.pi0.modeling_pi0 as pi0
import lerobot.policies.pi05.modeling_pi05 as pi05
import lerobot.processor.tokenizer_processor as words
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from lerobot_common import ACTION, CAMERAS, CHUNK, STATE, TASKS, answers, fill_policy, inputs, statistics, write
from lerobot_common import tokenizer as make_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 16, "patch_size": 8}


def shrink(module: types.ModuleType) -> None:
    """Make the module build tiny models: 8 heads of width 4, two layers, 320 words."""
    real = module.PaliGemmaForConditionalGenerationWithPiGemma

    def small(config: object) -> object:
        for name, value in {**SMALL, "projection_dim": 32, "vision_use_head": False}.items():
            setattr(config.vision_config, name, value)
        config.text_config.vocab_size = config._vocab_size = 320
        config.projection_dim = 32
        return real(config=config)

    module.PaliGemmaForConditionalGenerationWithPiGemma = small
    sizes = {"gemma_2b": (32, 48), "gemma_300m": (24, 40)}
    module.get_gemma_config = lambda name: types.SimpleNamespace(
        width=sizes[name][0], depth=3, mlp_dim=sizes[name][1], num_heads=8, num_kv_heads=1, head_dim=4
    )


def make(name: str) -> None:
    module, kind, processors_of = {
        "pi0": (pi0, PI0Config, make_pi0_pre_post_processors),
        "pi05": (pi05, PI05Config, make_pi05_pre_post_processors),
    }[name]
    shrink(module)
    config = kind(
        input_features={
            **{camera: PolicyFeature(FeatureType.VISUAL, (3, 24, 40)) for camera in CAMERAS},
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        chunk_size=CHUNK, n_action_steps=CHUNK, max_state_dim=8, max_action_dim=8, image_resolution=(32, 32),
        device="cpu", num_inference_steps=5, dtype="float32",
    )  # fmt: skip
    policy = (module.PI0Policy if name == "pi0" else module.PI05Policy)(config).eval()
    fill_policy(policy)
    words.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda _: make_tokenizer())
    processors = processors_of(config, statistics())
    batch = processors[0]({**inputs(), "task": list(TASKS)})
    found = answers(policy, batch, "pi")
    found["physical"] = processors[1](found["actions"].clone())
    found["ids"] = batch["observation.language.tokens"]
    found["mask"] = batch["observation.language.attention_mask"]
    found |= inputs()
    write(name, policy, processors, found)


if __name__ == "__main__":
    torch.manual_seed(0)
    make("pi0")
    make("pi05")
