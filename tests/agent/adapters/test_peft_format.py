"""Adapters travel in PEFT's own format: what `peft` saves we run, what we store `peft` runs, with equal outputs.

Pinned: both directions with peft itself, the stored object's folder as it is, the policy's head included, and every
refusal of a damaged or unsupported folder.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import attach, lora_config, peft_config
from ratchet_vla.adapters.peft_format import CONFIG, WEIGHTS, export_folder, import_folder
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.testing.conformance.store import refused
from ratchet_vla.testing.tiny_policy import TinyPolicy, batch, randomised, tiny


def peft_folder(folder: Path, seed: int = 3, **options: Any) -> tuple[torch.Tensor, Path]:
    """A folder written by peft, and the logits that peft's own model computes."""
    policy = TinyPolicy()
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(policy.module, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    policy.module = model.eval()
    logits = policy.logits(batch()).detach()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return logits, folder


@pytest.mark.parametrize("options", [{}, {"target_modules": ["second", "stem"]}, {"use_rslora": True}])
def test_what_peft_saves_computes_the_same_here(tmp_path: Path, options: dict[str, Any]) -> None:
    peft_logits, folder = peft_folder(tmp_path / "peft", **options)
    policy = TinyPolicy()
    adapter = import_folder(folder, binding_of(policy))
    lora = attach(policy.module, peft_config(adapter.config))
    lora.load(adapter.tensors, adapter.config)
    assert torch.equal(policy.logits(batch()), peft_logits)
    assert lora.adapter(adapter.binding).tensors.keys() == adapter.tensors.keys()


def test_what_is_stored_here_peft_loads(tmp_path: Path) -> None:
    policy, lora = tiny()
    adapter = randomised(lora, binding_of(policy), seed=4)
    lora.load(adapter.tensors)
    own_logits = policy.logits(batch()).detach()
    store = FolderStore(tmp_path, create=True)
    folder = tmp_path / "objects" / store.put(adapter).id

    loaded = TinyPolicy()
    loaded.module = peft.PeftModel.from_pretrained(loaded.module, str(folder)).eval()
    assert torch.equal(loaded.logits(batch()), own_logits)

    second = TinyPolicy()
    model = peft.get_peft_model(second.module, peft_config(lora_config(2, 2).to_dict()))
    model.load_adapter(str(folder), "mine")
    model.set_adapter("mine")
    second.module = model.eval()
    assert torch.equal(second.logits(batch()), own_logits)


def test_out_and_in_again_keeps_the_id(tmp_path: Path) -> None:
    policy, lora = tiny()
    adapter = randomised(lora, binding_of(policy), seed=4)
    export_folder(adapter, tmp_path / "out")
    assert import_folder(tmp_path / "out", adapter.binding).id == adapter.id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftConfig.from_pretrained(str(tmp_path / "out"))


def test_targets_name_exactly_the_adapted_layers(tmp_path: Path) -> None:
    """`0` as a list entry would also catch `inner.0` in peft."""

    class Nested(torch.nn.Sequential):
        def __init__(self) -> None:
            super().__init__(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
            self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3))

    net = Nested()
    plain = copy.deepcopy(net)
    lora = attach(net, lora_config(2, 2, r"0|1"))
    assert sorted(lora.layers) == ["0", "1"]
    model = peft.get_peft_model(plain, peft_config(lora.config))
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in model.modules()) == 2


def rewrite(folder: Path, **fields: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_damaged_and_unsupported_folders_are_refused(tmp_path: Path) -> None:
    binding = binding_of(TinyPolicy())

    def fresh(name: str) -> Path:
        return peft_folder(tmp_path / name)[1]

    refused("adapter.missing_file", import_folder, tmp_path / "absent", binding)
    folder = fresh("no-weights")
    (folder / WEIGHTS).unlink()
    assert "adapter_config.json" in refused("adapter.missing_file", import_folder, folder, binding).fix
    folder = fresh("cut")
    data = (folder / WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:size])
        refused("adapter.truncated", import_folder, folder, binding)
    folder = fresh("int")
    save_file({n: t.to(torch.int8) for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    refused("adapter.wrong_dtype", import_folder, folder, binding)
    folder = fresh("json")
    for text in ("{", "[]"):
        (folder / CONFIG).write_text(text)
        refused("adapter.bad_config", import_folder, folder, binding)
    for fields in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"modules_to_save": ["x"]}, {"r": 0}):
        folder = fresh("-".join(fields))
        rewrite(folder, **fields)
        refused("adapter.unsupported_config", import_folder, folder, binding)
