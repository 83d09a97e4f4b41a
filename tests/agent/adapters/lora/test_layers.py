"""LoRA layers and their arena: the running adapter must be exactly what was loaded, and nothing else may train.

Pinned: a fresh adapter is the base; only LoRA trains; every tensor is a view of one block; rank padding and alpha
folding do not change outputs; each kind of misfit is refused by its own code before anything is written.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.errors import RatchetError
from ratchet_vla.testing.tiny_policy import TinyPolicy, batch, made, tiny


def test_a_fresh_adapter_changes_nothing_and_only_it_trains() -> None:
    plain = TinyPolicy().logits(batch())
    policy, lora = tiny()
    assert torch.equal(policy.logits(batch()), plain)
    assert lora.effect().overall == 0.0
    trainable = {name for name, p in policy.module.named_parameters() if p.requires_grad}
    assert len(trainable) == len(lora.trainable()) == 6
    assert all("lora_" in name for name in trainable)
    policy.logits(batch()).sum().backward()
    assert all(p.grad is not None for p in lora.trainable())


def test_all_linear_includes_the_head_and_names_are_pefts() -> None:
    _, lora = tiny()
    assert sorted(lora.layers) == ["first", "lm_head", "second"]
    assert "base_model.model.lm_head.lora_A.weight" in lora.export()


def test_every_tensor_is_a_view_of_one_aligned_block() -> None:
    _, lora = tiny()
    (block,) = lora.arena.blocks.values()
    for parameter in lora.trainable():
        assert parameter.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        assert parameter.storage_offset() * parameter.element_size() % 64 == 0


def test_initial_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = tiny()[1].export()
    torch.manual_seed(2)
    second = tiny()[1].export()
    assert all(torch.equal(first[n], second[n]) for n in first)
    other_seed = attach(TinyPolicy().module, lora_config(4, 8), seed=1).export()
    assert not torch.equal(
        first["base_model.model.first.lora_A.weight"], other_seed["base_model.model.first.lora_A.weight"]
    )


def test_training_survives_pointing_at_another_arena() -> None:
    """Optimisers keep their parameters when the memory under them changes."""
    policy, lora = tiny()
    optimiser = torch.optim.SGD(lora.trainable(), lr=0.1)
    arena = lora.new_arena()
    arena.copy_(lora.arena)
    lora.point_at(arena)
    policy.logits(batch()).square().sum().backward()
    optimiser.step()
    assert lora.effect(arena).overall > 0.0


def test_a_smaller_rank_and_another_alpha_run_in_a_larger_slot() -> None:
    small_policy, small = tiny(rank=2, alpha=6)
    source = made()
    tensors = {n: (t[:2] if "lora_A" in n else t[:, :2]).contiguous() for n, t in source.tensors.items()}
    small.load(tensors)
    large_policy, large = tiny(rank=4, alpha=8)
    large.load(source.tensors)  # so that stale rows would show
    large.load(tensors, small.config)
    torch.testing.assert_close(large_policy.logits(batch()), small_policy.logits(batch()), rtol=1e-5, atol=1e-6)
    assert large.effect().overall == pytest.approx(small.effect().overall, rel=1e-6)


def test_rank_and_alpha_patterns_and_rslora_compute_what_peft_computes() -> None:
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules="all-linear", rank_pattern={"first": 3}, alpha_pattern={"lm_head": 5},
        use_rslora=True,
    )  # fmt: skip
    peft_policy = TinyPolicy()
    peft_lora = attach(peft_policy.module, config)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(t.shape, generator=generator) for n, t in peft_lora.export().items()}
    peft_lora.load(tensors)
    policy, own_lora = tiny(rank=4, alpha=4)
    own_lora.load(tensors, peft_lora.config)
    torch.testing.assert_close(policy.logits(batch()), peft_policy.logits(batch()), rtol=1e-4, atol=1e-5)


def test_effect_is_the_relative_norm_of_the_change() -> None:
    _, lora = tiny(target_modules=["first", "second", "stem"])
    lora.load({n: torch.randn(t.shape) for n, t in lora.export().items()})
    effect = lora.effect()
    total = 0.0
    base = 0.0
    for path, layer in lora.layers.items():
        delta = layer.get_delta_weight("default").detach()
        weight = layer.get_base_layer().weight
        assert effect.layers[path] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
        total = total + float(delta.norm()) ** 2
        base = base + float(weight.norm()) ** 2
    assert effect.overall == pytest.approx((total / base) ** 0.5, rel=1e-5)
    assert effect.nil == ()


def test_disabled_is_the_base() -> None:
    policy, lora = tiny()
    lora.load(made().tensors)
    with_adapter = policy.logits(batch())
    with lora.disabled():
        assert torch.equal(policy.logits(batch()), TinyPolicy().logits(batch()))
    assert torch.equal(policy.logits(batch()), with_adapter)


HEAD = "base_model.model.lm_head.lora_B.weight"


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("adapter.missing_keys", lambda t: t.pop(HEAD)),
        ("adapter.extra_keys", lambda t: t.update({"base_model.model.other.lora_A.weight": torch.zeros(4, 4)})),
        ("adapter.wrong_dtype", lambda t: t.update({HEAD: t[HEAD].double()})),
        ("adapter.wrong_shape", lambda t: t.update({HEAD: t[HEAD][1:]})),
        ("adapter.wrong_shape", lambda t: t.update({HEAD: t[HEAD].T.contiguous()})),
        ("adapter.wrong_shape", lambda t: t.update({HEAD: t[HEAD][:, :2].contiguous()})),
        ("adapter.not_finite", lambda t: t.update({HEAD: torch.full_like(t[HEAD], float("nan"))})),
        ("adapter.not_finite", lambda t: t[HEAD].__setitem__((0, 0), float("inf"))),
    ],
)
def test_a_misfit_is_refused_before_the_first_write(code: str, change: object) -> None:
    _, lora = tiny()
    lora.load(made(seed=5).tensors)
    before = lora.export()
    tensors = {n: t.clone() for n, t in made(seed=6).tensors.items()}
    change(tensors)  # type: ignore[operator]
    with pytest.raises(RatchetError) as refusal:
        lora.load(tensors)
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(before[n], t) for n, t in lora.export().items())


def test_a_larger_rank_than_the_slot_is_refused() -> None:
    _, large = tiny(rank=8)
    _, small = tiny(rank=4)
    with pytest.raises(RatchetError, match=r"adapter\.wrong_shape"):
        small.load(large.export(), large.config)


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("adapter.unsupported_config", {"use_dora": True}),
        ("adapter.unsupported_config", {"bias": "all"}),
        ("adapter.unsupported_config", {"lora_bias": True}),
        ("adapter.unsupported_config", {"modules_to_save": ["lm_head"]}),
        ("adapter.unsupported_config", {"init_lora_weights": "pissa"}),
        ("adapter.unsupported_config", {"lora_dropout": 0.1}),
        ("adapter.no_layers", {"target_modules": ["absent"]}),
    ],
)
def test_unsupported_configurations_leave_the_module_alone(code: str, options: dict[str, object]) -> None:
    policy = TinyPolicy()
    with pytest.raises(RatchetError) as refusal:
        attach(policy.module, LoraConfig(**{"target_modules": "all-linear", **options}))
    assert refusal.value.code == code
    assert not any("lora" in name for name, _ in policy.module.named_modules())


def test_attaching_twice_is_refused() -> None:
    policy, _ = tiny()
    with pytest.raises(RatchetError, match=r"adapter\.already_attached"):
        attach(policy.module, lora_config(2, 2))


def test_adapters_train_in_float32_whatever_the_base_is_stored_in() -> None:
    lora = attach(TinyPolicy().module.bfloat16(), lora_config(2, 2))
    assert set(lora.layout.sizes) == {torch.float32}
    parameter = lora.trainable()[0]
    before = parameter.detach().clone()
    optimizer = torch.optim.AdamW(lora.trainable(), lr=2e-5, weight_decay=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bool((parameter != before).all())
    assert bool((before.bfloat16() - 2e-5 == before.bfloat16()).any())  # what bfloat16 would have lost


def test_an_adapter_stored_in_bfloat16_attaches_and_keeps_its_id_until_it_is_trained() -> None:
    written = attach(TinyPolicy().module.bfloat16(), lora_config(2, 2), dtype=torch.bfloat16, seed=3)
    for parameter in written.trainable():
        parameter.data.add_(0.25)
    policy = TinyPolicy()
    stored = written.adapter(binding_of(policy))
    lora = attach(policy.module, lora_config(2, 2))
    lora.load(stored.tensors, stored.config)
    assert lora.adapter(binding_of(policy)).id == stored.id
    assert all(torch.equal(lora.parameters[n].data, t.float()) for n, t in stored.tensors.items())
    lora.trainable()[0].data.add_(1e-5)
    trained = lora.adapter(binding_of(policy))
    assert trained.id != stored.id
    assert {t.dtype for t in trained.tensors.values()} == {torch.float32}


def test_an_adapter_finer_than_its_layers_is_refused() -> None:
    lora = attach(TinyPolicy().module.bfloat16(), lora_config(2, 2), dtype=torch.bfloat16)
    before = lora.export()
    with pytest.raises(RatchetError) as refused:
        lora.load({n: t.float() for n, t in before.items()})
    assert refused.value.code == "adapter.wrong_dtype"
    assert all(torch.equal(t, before[n]) for n, t in lora.export().items())
