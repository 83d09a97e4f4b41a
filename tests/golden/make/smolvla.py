"""Golden SmolVLA: a tiny LeRobot policy with weights from tests/golden/fill.py, its files and its answers.

Needs lerobot 0.6.1 and transformers 5.5.4. Writes tests/golden/flow/smolvla.
"""

import types

import lerobot.policies.smolvla.smolvlm_with_expert as expert
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot_common import ACTION, CAMERAS, CHUNK, GOLDEN, STATE, TASKS, answers, fill_policy, inputs, statistics, write
from lerobot_common import tokenizer as make_tokenizer
from transformers import SmolVLMConfig


def main() -> None:
    folder = GOLDEN / "flow" / "smolvla"
    vlm = folder / "vlm"
    SmolVLMConfig(
        scale_factor=2,
        text_config={
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "rms_norm_eps": 1e-5,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8,
        },
        image_token_id=10,
    ).save_pretrained(vlm)  # fmt: skip
    stand_in = types.SimpleNamespace(tokenizer=types.SimpleNamespace(fake_image_token_id=11, global_image_token_id=12))
    expert.AutoProcessor = types.SimpleNamespace(from_pretrained=lambda _: stand_in)
    config = SmolVLAConfig(
        input_features={
            **{name: PolicyFeature(FeatureType.VISUAL, (3, 24, 40)) for name in CAMERAS},
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        chunk_size=CHUNK, n_action_steps=CHUNK, max_state_dim=8, max_action_dim=8, num_vlm_layers=4,
        resize_imgs_with_padding=(32, 32), vlm_model_name=str(vlm), device="cpu", num_steps=5,
    )  # fmt: skip
    policy = SmolVLAPolicy(config).eval()
    fill_policy(policy)
    config.vlm_model_name = "vlm"
    processors = make_smolvla_pre_post_processors_without_words(config)
    batch = inputs()
    words = make_tokenizer()([f"{t}\n" for t in TASKS], padding="longest", padding_side="right", return_tensors="pt")
    scaled = processors[0].steps[-1]
    transition = scaled._normalize_observation(batch, inverse=False)
    batch = dict(transition)
    batch["observation.language.tokens"] = words["input_ids"]
    batch["observation.language.attention_mask"] = words["attention_mask"].bool()
    found = answers(policy, batch, "smolvla")
    found["physical"] = processors[1](found["actions"].clone())
    found |= inputs()
    write("smolvla", policy, processors, found)


def make_smolvla_pre_post_processors_without_words(config: SmolVLAConfig) -> tuple:
    """The published pipeline; its tokenizer step would look a tokenizer up on the hub, so it gets ours."""
    import lerobot.processor.tokenizer_processor as step

    step.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda _: make_tokenizer())
    return make_smolvla_pre_post_processors(config, statistics())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
