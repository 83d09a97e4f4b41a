"""The adapter id: the one thing that ties an action to the weights that made it.

Pinned: a golden id (a change of the format must be a new format version, never a silent one), its sensitivity to any
single bit or field, and its indifference to the order of keys and to what PEFT writes for its own use.
"""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_vla.adapters.identity import Adapter, Binding, action_space_of, adapter_id, binding_of, canonical_config
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.canonical import canonical_json
from ratchet_vla.testing.tiny_policy import SPEC, TinyPolicy

A = "base_model.model.x.lora_A.weight"
B = "base_model.model.x.lora_B.weight"
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["x", "y"]}
BINDING = Binding("ab" * 32, {"q01": [-1.0], "q99": [1.0]}, {"control_mode": "ee_delta", "chunk": 8})
GOLDEN = "1994e3c90d0b59c6351c9de1ebd8dfd1f438ff7d2b467b4b6449331524174149"


def tensors() -> dict[str, torch.Tensor]:
    return {A: torch.tensor([[0.5, -1.0, 2.0]]), B: torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)}


def test_golden_id() -> None:
    assert adapter_id(tensors(), CONFIG, BINDING) == GOLDEN


def test_the_documented_bytes_give_the_id() -> None:
    """The format as the module's head describes it, built by hand."""
    config = (
        '{"alpha_pattern":{},"lora_alpha":2,"peft_type":"LORA","r":1,"rank_pattern":{},'
        '"target_modules":["x","y"],"use_rslora":false}'
    )
    records = [
        b"ratchet.adapter.v1",
        b"ab" * 32,
        hashlib.sha256(b'{"q01":[-1.0],"q99":[1.0]}').hexdigest().encode(),
        hashlib.sha256(b'{"chunk":8,"control_mode":"ee_delta"}').hexdigest().encode(),
        config.encode(),
        *(A.encode(), b"F32", b"1,3", struct.pack("<3f", 0.5, -1.0, 2.0)),
        *(B.encode(), b"BF16", b"2,1", bytes([0x80, 0x3F, 0, 0])),
    ]
    data = b"".join(struct.pack("<Q", len(r)) + r for r in records)
    assert hashlib.sha256(data).hexdigest() == adapter_id(tensors(), CONFIG, BINDING)


@given(st.sampled_from([A, B]), st.data())
def test_any_flipped_bit_changes_the_id(name: str, data: st.DataObject) -> None:
    changed = tensors()
    raw = changed[name].view(torch.uint8).reshape(-1)
    byte = data.draw(st.integers(0, raw.numel() - 1))
    bit = data.draw(st.integers(0, 7))
    raw[byte] ^= 1 << bit
    assert adapter_id(changed, CONFIG, BINDING) != GOLDEN


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 2),
        ("lora_alpha", 3),
        ("lora_alpha", 2.5),
        ("target_modules", ["x"]),
        ("target_modules", "all-linear"),
        ("rank_pattern", {"x": 2}),
        ("alpha_pattern", {"x": 2}),
        ("use_rslora", True),
    ],
)
def test_any_changed_configuration_field_changes_the_id(field: str, value: object) -> None:
    assert adapter_id(tensors(), {**CONFIG, field: value}, BINDING) != GOLDEN


@pytest.mark.parametrize(
    "binding",
    [
        Binding("ac" * 32, BINDING.statistics, BINDING.action_space),
        Binding(BINDING.base_hash, {"q01": [-1.0], "q99": [1.0000001]}, BINDING.action_space),
        Binding(BINDING.base_hash, BINDING.statistics, {"control_mode": "ee_delta", "chunk": 4}),
    ],
)
def test_any_changed_binding_changes_the_id(binding: Binding) -> None:
    assert adapter_id(tensors(), CONFIG, binding) != GOLDEN


def test_shape_name_and_dtype_are_part_of_the_id() -> None:
    same_bytes = [
        {**tensors(), A: tensors()[A].T.contiguous()},
        {A + "x": tensors()[A], B: tensors()[B]},
        {A: tensors()[A], B: tensors()[B].view(torch.float16)},
    ]
    ids = {adapter_id(t, CONFIG, BINDING) for t in same_bytes}
    assert len(ids) == 3
    assert GOLDEN not in ids


@given(st.permutations(sorted(CONFIG)), st.permutations([A, B]), st.permutations(["x", "y"]))
@settings(max_examples=20)
def test_order_and_pefts_own_fields_do_not_matter(keys: list[str], names: list[str], targets: list[str]) -> None:
    config = {key: CONFIG[key] for key in keys} | {"target_modules": set(targets), "lora_alpha": 2.0}
    config |= {"peft_version": "9", "inference_mode": True, "lora_dropout": 0.05, "base_model_name_or_path": "b"}
    assert adapter_id({n: tensors()[n] for n in names}, config, BINDING) == GOLDEN


def test_memory_layout_does_not_matter() -> None:
    strided = torch.zeros(3, 4)[:, 1:2].T
    strided.copy_(tensors()[A])
    assert adapter_id({**tensors(), A: strided}, CONFIG, BINDING) == GOLDEN


def test_unknown_fields_of_a_future_peft_are_refused_unless_off() -> None:
    assert canonical_config({**CONFIG, "use_new_trick": False}) == canonical_config(CONFIG)
    with pytest.raises(RatchetError, match=r"adapter\.unsupported_config.*use_new_trick"):
        canonical_config({**CONFIG, "use_new_trick": True})
    with pytest.raises(RatchetError, match=r"adapter\.unsupported_config.*LOHA"):
        canonical_config({**CONFIG, "peft_type": "LOHA"})


def test_integer_tensors_are_refused() -> None:
    with pytest.raises(RatchetError, match=r"adapter\.wrong_dtype"):
        adapter_id({A: torch.zeros(1, 3, dtype=torch.int8)}, CONFIG, BINDING)


def test_a_policy_is_bound_by_base_statistics_and_action_space() -> None:
    first = binding_of(TinyPolicy())
    second = binding_of(TinyPolicy(statistics={"q01": [-2.0], "q99": [2.0]}))
    assert first.statistics_hash != second.statistics_hash
    assert first.action_space_hash == second.action_space_hash
    assert canonical_json(action_space_of(SPEC)) == canonical_json(dict(first.action_space))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("adapter.wrong_base", {"base_hash": "cd" * 32}),
        ("adapter.wrong_statistics", {"statistics": {}}),
        ("adapter.wrong_base", {"base_hash": "cd" * 32, "statistics": {}}),
        ("adapter.wrong_action_space", {"action_space": {}}),
        ("adapter.wrong_base", {"base_hash": "cd" * 32, "statistics": {}, "action_space": {}}),
    ],
)
def test_a_foreign_binding_is_refused_with_its_narrowest_reason(code: str, changes: dict[str, object]) -> None:
    values = {"base_hash": BINDING.base_hash, "statistics": BINDING.statistics, "action_space": BINDING.action_space}
    BINDING.require(Binding(**values))  # type: ignore[arg-type]
    with pytest.raises(RatchetError) as refusal:
        BINDING.require(Binding(**{**values, **changes}))  # type: ignore[arg-type]
    assert refusal.value.code == code


def test_an_adapter_keeps_its_configuration_in_canonical_form() -> None:
    adapter = Adapter(tensors(), {**CONFIG, "peft_version": "1", "target_modules": {"y", "x"}}, BINDING)
    assert adapter.config == canonical_config(CONFIG)
    assert adapter.id == GOLDEN
    assert adapter.bytes == 16
