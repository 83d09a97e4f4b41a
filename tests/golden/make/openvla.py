"""Golden OpenVLA: seven tokens one after another, by the libraries that its published model is made of.

timm's towers and transformers' Llama (eager) with its own cache, wired as the published modelling file wires them:
second to last block's patches of both towers side by side, the fused projector, patches behind the first token. Batch
1, as published. The next token is the best of the 256 action ids. Weights: tests/golden/oft_one_image. Also the L1
head and the state projector of OpenVLA-OFT, over given hidden states and values, as plain torch modules of the
published shapes. Writes tests/golden/openvla/autoregressive.safetensors.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shim  # noqa: F401
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).resolve().parents[1]
DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"


def tower(name: str, sizes: dict, weights: dict, prefix: str) -> nn.Module:
    model = timm.create_model(
        name, pretrained=False, num_classes=0, img_size=sizes["image_size"], embed_dim=sizes["embed_dim"],
        depth=sizes["depth"], num_heads=sizes["num_heads"],
    )  # fmt: skip
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    own = {k.replace("scale_factor", "gamma"): v for k, v in own.items()}
    model.load_state_dict(own)
    return model.eval()


@torch.no_grad()
def main() -> None:
    config = json.loads((GOLDEN / "oft_one_image/config.json").read_text())
    weights = load_file(GOLDEN / "oft_one_image/model.safetensors")
    given = load_file(GOLDEN / "oft_one_image/io.safetensors")
    towers = [
        tower(DINO, config["vision"], weights, "vision_backbone.featurizer."),
        tower(SIGLIP, config["vision"], weights, "vision_backbone.fused_featurizer."),
    ]
    language = LlamaForCausalLM._from_config(LlamaConfig(**config["text"]), attn_implementation="eager").eval()
    language.load_state_dict(
        {k.removeprefix("language_model."): v for k, v in weights.items() if k.startswith("language_model.")},
        strict=False,
    )
    layers = [nn.Linear(*reversed(weights[f"projector.fc{i}.weight"].shape)) for i in (1, 2, 3)]
    for i, layer in enumerate(layers, 1):
        layer.load_state_dict({k: weights[f"projector.fc{i}.{k}"] for k in ("weight", "bias")})
    projector = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])

    first = config["text"]["vocab_size"] - 64 - 256
    tokens, logits = [], []
    for ids, mask, pixels in zip(given["input_ids"], given["attention_mask"], given["pixel_values"], strict=True):
        present_ids = ids[mask.bool()][None]
        parts = pixels.reshape(1, 6, *pixels.shape[-2:]).split(3, dim=1)
        features = [t.get_intermediate_layers(x, n={len(t.blocks) - 2})[0] for t, x in zip(towers, parts, strict=True)]
        text = language.get_input_embeddings()(present_ids)
        patches = projector(torch.cat(features, 2))
        out = language(inputs_embeds=torch.cat([text[:, :1], patches, text[:, 1:]], 1), use_cache=True)
        row = []
        for _ in range(7):
            logits.append(out.logits[0, -1, first : first + 256])
            row.append(logits[-1].argmax())
            step = (row[-1] + first).view(1, 1)
            out = language(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        tokens.append(torch.stack(row))
    golden = {"tokens": torch.stack(tokens), "logits": torch.stack(logits).view(3, 7, 256)}

    torch.manual_seed(0)
    hidden, dims, width = given["last_hidden_states"], 7, config["text"]["hidden_size"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.ffn(x)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_norm1, self.fc1 = nn.LayerNorm(width * dims), nn.Linear(width * dims, width)
            self.relu = nn.ReLU()
            self.mlp_resnet_blocks = nn.ModuleList([Block(), Block()])
            self.layer_norm2, self.fc2 = nn.LayerNorm(width), nn.Linear(width, dims)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.relu(self.fc1(self.layer_norm1(x)))
            for block in self.mlp_resnet_blocks:
                x = block(x)
            return self.fc2(self.layer_norm2(x))

    head = Head()
    golden["l1.actions"] = head(hidden.reshape(len(hidden), -1, dims * width))
    golden |= {f"l1.model.{k}": v for k, v in head.state_dict().items()}
    golden["l1.hidden"] = hidden
    (GOLDEN / "openvla").mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in golden.items()}, GOLDEN / "openvla/autoregressive.safetensors")


if __name__ == "__main__":
    main()
