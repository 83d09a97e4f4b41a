"""The hot swap: an arm must never move on weights that are half one adapter and half another, nor under a wrong id.

Pinned: every refusal leaves the running adapter's bytes and outputs as they were; the canary runs before the first
write; forwards beside 200 swaps each match exactly the adapter whose id they report; rollback, base and merge exact.
Determinism: outputs are compared bit for bit with ones computed before; threads are joined, nothing sleeps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from ratchet_vla.adapters.identity import Adapter, Binding, binding_of
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.errors import RatchetError
from ratchet_vla.testing.conformance.store import refused
from ratchet_vla.testing.conformance.swap import SwapSuite
from ratchet_vla.testing.tiny_policy import TinyPolicy, batch, randomised, tiny

Mode = Literal["flip", "copy"]


class TestTinyPolicy(SwapSuite):
    @pytest.fixture
    def make(self) -> type[TinyPolicy]:
        return TinyPolicy

    @pytest.fixture
    def answer(self) -> Callable[[TinyPolicy], torch.Tensor]:
        return lambda policy: policy.logits(batch())


class Bench:
    """A policy with a swapper, two good adapters and what each computes."""

    def __init__(self, root: Path, mode: Mode = "flip") -> None:
        self.policy, self.lora = tiny()
        self.binding = binding_of(self.policy)
        self.store = FolderStore(root, create=True)
        self.swapper = HotSwapper(self.policy, self.lora, store=self.store, mode=mode)
        self.one, self.two = (randomised(self.lora, self.binding, seed) for seed in (1, 2))
        self.store.put(self.one)
        self.store.put(self.two)
        self.base = TinyPolicy().logits(batch()).detach()

    def logits(self) -> torch.Tensor:
        with self.swapper.running():
            return self.policy.logits(batch()).detach()

    def state(self) -> tuple[bytes, ...]:
        """Everything a refused swap must leave as it was, to the bit."""
        tensors = [t for _, t in sorted(self.policy.module.state_dict().items())]
        return (
            *(t.numpy().tobytes() for t in tensors),
            self.logits().numpy().tobytes(),
            self.swapper.current_id.encode(),
        )

    def alone(self, adapter: Adapter) -> torch.Tensor:
        """What the adapter computes in a policy of its own."""
        policy, lora = tiny()
        lora.load(adapter.tensors, adapter.config)
        return policy.logits(batch()).detach()


@pytest.fixture(params=["flip", "copy"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, request.param)


def test_the_base_runs_under_its_own_hash(bench: Bench) -> None:
    assert bench.swapper.current_id == bench.policy.base_hash
    assert torch.equal(bench.logits(), bench.base)


def test_an_adapter_already_attached_runs_under_its_id(bench: Bench) -> None:
    policy, lora = tiny()
    lora.load(bench.one.tensors)
    assert HotSwapper(policy, lora).current_id == bench.one.id


def test_a_swap_runs_exactly_the_adapter_and_tells_what_it_did(bench: Bench) -> None:
    report = bench.swapper.swap(bench.one.id[:10])
    assert (report.old_id, report.new_id) == (bench.policy.base_hash, bench.one.id)
    assert bench.swapper.current_id == bench.one.id
    assert torch.equal(bench.logits(), bench.alone(bench.one))
    assert report.ready == pytest.approx(report.load + report.validate + report.stage + report.canary)
    assert min(report.load, report.validate, report.stage, report.canary, report.unavailable) > 0.0
    assert report.effect == pytest.approx(bench.lora.effect().overall)
    assert report.canary_change > 0.0
    assert report.warnings == ()
    assert torch.equal(next(iter(bench.lora.export().values())), next(iter(bench.one.tensors.values())))


def test_back_and_forth_by_every_road_is_exact(bench: Bench) -> None:
    swapper = bench.swapper
    refused("adapter.no_previous", swapper.rollback)
    swapper.swap(bench.one)
    swapper.swap(bench.two)
    assert swapper.previous_id == bench.one.id
    assert swapper.rollback().ready == 0.0
    assert torch.equal(bench.logits(), bench.alone(bench.one))
    assert swapper.rollback().new_id == bench.two.id
    assert torch.equal(bench.logits(), bench.alone(bench.two))
    assert swapper.swap(BASE).new_id == bench.policy.base_hash
    assert torch.equal(bench.logits(), bench.base)
    assert swapper.rollback().new_id == bench.two.id


def test_adapters_in_memory_are_not_read_again(bench: Bench) -> None:
    bench.swapper.swap(bench.one.id)
    bench.swapper.swap(bench.two.id)
    weights = bench.store.root / "objects" / bench.one.id / "adapter_model.safetensors"
    weights.unlink()
    report = bench.swapper.swap(bench.one.id)
    assert report.canary == 0.0
    assert torch.equal(bench.logits(), bench.alone(bench.one))
    third = randomised(bench.lora, bench.binding, 3)
    bench.swapper.swap(bench.two.id)
    bench.swapper.swap(third)
    bench.swapper.swap(BASE)  # keep=3: the first one has left
    refused("adapter.missing_file", bench.swapper.swap, bench.one.id)


def altered(adapter: Adapter, **changes: object) -> Adapter:
    values = {"tensors": adapter.tensors, "config": adapter.config, "binding": adapter.binding}
    return Adapter(**{**values, **changes})  # type: ignore[arg-type]


HEAD = "base_model.model.lm_head.lora_B.weight"


def bad_adapters(good: Adapter) -> dict[str, Adapter]:
    tensors = dict(good.tensors)
    binding = good.binding
    return {
        "adapter.wrong_base": altered(good, binding=Binding("00" * 32, binding.statistics, binding.action_space)),
        "adapter.wrong_statistics": altered(good, binding=Binding(binding.base_hash, {}, binding.action_space)),
        "adapter.wrong_action_space": altered(good, binding=Binding(binding.base_hash, binding.statistics, {})),
        "adapter.missing_keys": altered(good, tensors={n: t for n, t in tensors.items() if n != HEAD}),
        "adapter.extra_keys": altered(good, tensors={**tensors, "base_model.model.x.lora_A.weight": tensors[HEAD]}),
        "adapter.wrong_shape": altered(good, tensors={**tensors, HEAD: tensors[HEAD][:5]}),
        "adapter.not_finite": altered(good, tensors={**tensors, HEAD: tensors[HEAD] / 0.0}),
        # Finite weights whose product overflows: only running it shows.
        "adapter.canary_failed": altered(good, tensors={n: t * 1e30 for n, t in tensors.items()}),
    }


@pytest.mark.parametrize("through_store", [True, False])
def test_every_refusal_leaves_the_running_adapter_bit_identical(bench: Bench, through_store: bool) -> None:
    bench.swapper.swap(bench.one)
    before = bench.state()
    for code, bad in bad_adapters(bench.two).items():
        reference = bench.store.put(bad).id if through_store else bad
        refused(code, bench.swapper.swap, reference)
        assert bench.state() == before, code
    refused("adapter.unknown", bench.swapper.swap, "nothing-like-it")
    weights = bench.store.root / "objects" / bench.two.id / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-9])
    refused("adapter.truncated", bench.swapper.swap, bench.two.id)
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused("adapter.hash_mismatch", bench.swapper.swap, bench.two.id)
    with pytest.raises(RatchetError, match=r"adapter\.hash_mismatch"):
        bench.swapper.swap(bench.two, expected_id=bench.one.id)
    assert bench.state() == before
    assert bench.swapper.previous_id == bench.policy.base_hash


def test_the_canary_runs_before_the_first_write_and_can_know_the_answer(bench: Bench) -> None:
    bench.swapper.swap(bench.one)
    before = bench.state()
    staged = bench.swapper.stage(bench.two)
    assert bench.state() == before  # staging and its canary write nothing that runs
    answer = staged.canary_actions
    staged_again = bench.swapper.stage(altered(bench.two), expected_actions=answer, tolerance=0.0)
    assert torch.equal(staged_again.canary_actions, answer)
    with pytest.raises(RatchetError, match=r"adapter\.canary_failed.*differ"):
        bench.swapper.stage(bench.two, expected_actions=answer + 0.01)
    assert bench.state() == before
    bench.swapper.commit(staged)
    assert torch.equal(bench.logits(), bench.alone(bench.two))


def test_an_adapter_without_effect_is_told(bench: Bench) -> None:
    """Complaints of the field: an adapter that was never applied looks like one that learned nothing."""
    nothing = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in bench.one.tensors.items()}
    report = bench.swapper.swap(altered(bench.one, tensors=nothing))
    assert [w.code for w in report.warnings] == ["adapter.no_effect"]
    assert report.effect == 0.0
    half = {n: torch.zeros_like(t) if "first.lora_A" in n else t for n, t in bench.one.tensors.items()}
    report = bench.swapper.swap(altered(bench.one, tensors=half))
    assert [w.code for w in report.warnings] == ["adapter.partial_effect"]
    assert report.effect > 0.0
    assert [w.code for w in bench.swapper.swap(altered(bench.one, tensors=half)).warnings] == [
        "adapter.already_active",
        "adapter.partial_effect",
    ]
    assert bench.swapper.swap(BASE).warnings == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_runs_at_the_base_and_unmerging_restores_it_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    policy = TinyPolicy()
    policy.module.to(dtype)
    weights = {n: t.clone() for n, t in policy.module.state_dict().items()}
    lora = attach(policy.module, lora_config(4, 8, ["first", "second", "lm_head", "stem"]))
    swapper = HotSwapper(_cast(policy, dtype), lora)
    swapper.swap(randomised(lora, binding_of(policy), 1))
    unmerged = policy.logits(batch()).float()
    before = policy.module.state_dict()
    swapper.merge()
    assert swapper.merged
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(policy.logits(batch()).float(), unmerged, rtol=tolerance, atol=tolerance)
    other_adapter = randomised(lora, binding_of(policy), 2)
    refused("adapter.merged", swapper.swap, other_adapter)
    refused("adapter.merged", swapper.rollback)
    swapper.unmerge()
    assert torch.equal(policy.logits(batch()).float(), unmerged)
    for name, tensor in policy.module.state_dict().items():
        assert torch.equal(tensor, before[name])
        if "lora" not in name:
            assert torch.equal(tensor, weights[name.replace(".base_layer", "")])
    swapper.swap(BASE)
    lora_free = TinyPolicy()
    lora_free.module.to(dtype)
    assert torch.equal(policy.logits(batch()), _cast(lora_free, dtype).logits(batch()))


def _cast(policy: TinyPolicy, dtype: torch.dtype) -> TinyPolicy:
    policy.module.register_forward_pre_hook(_ToDtype(dtype))
    return policy


class _ToDtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0].to(self.dtype)


def test_tied_weights_are_not_merged(tmp_path: Path) -> None:
    policy = TinyPolicy()
    policy.module.twin = torch.nn.Linear(16, 16)
    policy.module.twin.weight = policy.module.second.weight
    lora = attach(policy.module, lora_config(2, 2, ["second"]))
    swapper = HotSwapper(policy, lora)
    assert "twin.weight" in refused("adapter.tied_weights", swapper.merge).what
    assert not swapper.merged


def test_a_running_forward_that_does_not_end_keeps_the_old_adapter(bench: Bench) -> None:
    bench.swapper._timeout = 0.01
    staged = bench.swapper.stage(bench.one)
    inside = threading.Event()
    leave = threading.Event()

    def hang() -> None:
        with bench.swapper.running():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hang)
    thread.start()
    inside.wait()
    refused("adapter.busy", bench.swapper.commit, staged)
    with bench.swapper.running():
        refused("adapter.busy", bench.swapper.commit, staged)
    leave.set()
    thread.join()
    assert torch.equal(bench.logits(), bench.base)
    assert bench.swapper.current_id == bench.policy.base_hash


def test_no_forward_sees_a_torn_adapter_or_a_wrong_id(bench: Bench) -> None:
    """One thread runs forwards without a pause while another swaps 200 times and stages from the store in between."""
    outputs = {bench.one.id: bench.alone(bench.one), bench.two.id: bench.alone(bench.two)}
    staged = [bench.swapper.stage(bench.one), bench.swapper.stage(bench.two)]
    bench.swapper.commit(staged[0])
    observed: list[tuple[str, bool]] = []
    finished = threading.Event()

    def run() -> None:
        while not finished.is_set():
            with bench.swapper.running() as name:
                logits = bench.policy.logits(batch()).detach()
            observed.append((name, torch.equal(logits, outputs[name])))

    thread = threading.Thread(target=run)
    thread.start()
    swaps = 0
    while swaps < 200 or len({name for name, _ in observed}) < 2:
        swaps += 1
        if swaps % 20 == 0:
            bench.swapper.stage(altered((bench.one, bench.two)[swaps // 20 % 2]))  # its canary shares the base
        assert bench.swapper.commit(staged[swaps % 2]).new_id == staged[swaps % 2].id
    finished.set()
    thread.join()
    assert {name for name, _ in observed} == set(outputs)
    assert all(exact for _, exact in observed)


def test_nothing_is_looked_up_without_a_store(bench: Bench) -> None:
    refused("adapter.no_store", HotSwapper(*tiny()).swap, "active")


def test_a_smaller_rank_swaps_into_a_larger_slot(bench: Bench) -> None:
    policy, small = tiny(rank=2, alpha=4)
    adapter = randomised(small, bench.binding, 7)
    small.load(adapter.tensors)
    bench.swapper.swap(adapter)
    torch.testing.assert_close(bench.logits(), policy.logits(batch()).detach(), rtol=1e-5, atol=1e-6)
    assert bench.swapper.current_id == adapter.id
    assert isinstance(bench.lora, Lora)
