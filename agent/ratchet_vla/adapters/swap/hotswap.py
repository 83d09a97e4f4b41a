"""Hot swap of the running LoRA adapter between two chunks; a refused swap leaves no trace.

Knows the order of a swap: check everything, stage beside, try it on a canary observation, then flip. Knows no robot, no
training and no network. The swapper owns the running adapter's tensors: nobody else may write them meanwhile.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ratchet_vla.adapters.identity import Adapter, binding_of
from ratchet_vla.adapters.lora.arena import Arena
from ratchet_vla.adapters.lora.layers import Effect, Lora
from ratchet_vla.adapters.lora.merge import Merge
from ratchet_vla.adapters.protocol import BASE, AdapterStore, Problem
from ratchet_vla.adapters.swap.canary import Canary
from ratchet_vla.adapters.swap.rw_lock import Interruption, RWLock, WriteTimeout
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.protocol import Policy, PolicyInput

__all__ = ["HotSwapper", "Staged", "SwapReport"]


@dataclass(frozen=True, eq=False)
class Staged:
    """An adapter that passed every check and lies in memory beside the running one.

    Attributes:
        canary_actions: (1, K, D) float32, physical units, what it answers to the canary observation.
        load, validate, stage, canary: seconds each part took; 0 where it was not needed.
    """

    id: str
    arena: Arena
    effect: Effect
    canary_actions: Tensor
    load: float = 0.0
    validate: float = 0.0
    stage: float = 0.0
    canary: float = 0.0

    @property
    def ready(self) -> float:
        """Seconds from the request until it could be flipped to."""
        return self.load + self.validate + self.stage + self.canary


@dataclass(frozen=True)
class SwapReport:
    """What a swap did. Times in seconds.

    Attributes:
        ready: load + validate + stage + canary; the running policy works on meanwhile.
        waited: from ready until the forward that was running had ended.
        unavailable: how long forwards were held off for the flip itself.
        preempted: another process took the core during the flip, so that `unavailable` tells of the host's load.
        canary_change: largest difference between the new and the old adapter's canary actions, physical units.
        warnings: `adapter.no_effect` where the adapter leaves the base as it is; `adapter.partial_effect` where only
            some layers are changed; `adapter.already_active`.
    """

    old_id: str
    new_id: str
    load: float
    validate: float
    stage: float
    canary: float
    ready: float
    waited: float
    unavailable: float
    preempted: bool
    effect: float
    canary_change: float
    warnings: tuple[Problem, ...]


class HotSwapper:
    """The one place where the running adapter changes."""

    def __init__(
        self,
        policy: Policy,
        lora: Lora,
        *,
        store: AdapterStore | None = None,
        canary: PolicyInput | None = None,
        mode: Literal["flip", "copy"] = "flip",
        keep: int = 3,
        timeout: float = 5.0,
    ) -> None:
        """Take charge of `lora`, attached to `policy.module`.

        Args:
            store: where references (tags, ids) are looked up; None where only adapters in memory are given.
            canary: one observation that every adapter must answer with finite actions; None makes a synthetic one.
            mode: `flip` changes pointers; `copy` writes into the same memory, as a captured CUDA graph needs.
            keep: adapters kept in memory for immediate use, the running and the previous one included; at least 2.
            timeout: seconds to wait for a gap between forwards.
        """
        self._policy = policy
        self._lora = lora
        self._store = store
        self._mode = mode
        self._keep = max(keep, 2)
        self._timeout = timeout
        self._binding = binding_of(policy)
        self._canary = Canary(policy, lora, canary)
        self._lock = RWLock()
        # One staging at a time: the canary's shadow policy is shared. Forwards and commits go on meanwhile.
        self._staging = threading.Lock()
        # Orders commit, rollback, merge and unmerge; guards _current, _previous, _resident and _merge.
        self._committing = threading.Lock()
        self._merge: Merge | None = None
        effect = lora.effect()
        # In copy mode the layers keep their arena for good, so what runs needs a copy of its own to roll back to.
        running_arena = lora.arena
        if mode == "copy":
            running_arena = lora.new_arena()
            running_arena.copy_(lora.arena)
        initial_id = self.base_id if effect.overall == 0.0 else lora.adapter(self._binding).id
        self._current = Staged(initial_id, running_arena, effect, self._canary.actions(running_arena))
        self._previous: Staged | None = None
        self._resident: OrderedDict[str, Staged] = OrderedDict({initial_id: self._current})

    # -- what runs -----------------------------------------------------------------------------------------------

    @property
    def base_id(self) -> str:
        """The id under which the base runs alone: its hash."""
        return self._binding.base_hash

    @property
    def current_id(self) -> str:
        """Id of the running adapter at this moment; use `running` to tie it to a forward."""
        return self._current.id

    @property
    def previous_id(self) -> str | None:
        return self._previous.id if self._previous else None

    @property
    def merged(self) -> bool:
        return self._merge is not None

    @contextmanager
    def running(self) -> Iterator[str]:
        """`with swapper.running() as adapter_id:` run forwards inside; all of them ran under that id.

        On a GPU the results must have reached the host (or been synchronised) before the block ends.
        """
        with self._lock.read():
            yield self._current.id

    # -- swapping ------------------------------------------------------------------------------------------------

    def stage(
        self,
        adapter: Adapter | str,
        *,
        expected_id: str | None = None,
        expected_actions: Tensor | None = None,
        tolerance: float = 1e-4,
    ) -> Staged:
        """Check an adapter and lay it beside the running one, which is neither touched nor held up. Any thread.

        Args:
            adapter: an adapter, or a reference into the store.
            expected_id: what the sender said it is.
            expected_actions: (1, K, D) what the canary observation must give, within `tolerance` (physical units).

        Raises:
            RatchetError: whatever the store refuses; adapter.hash_mismatch, adapter.wrong_base,
                adapter.wrong_statistics, adapter.wrong_action_space, adapter.unsupported_config, adapter.missing_keys,
                adapter.extra_keys, adapter.wrong_dtype, adapter.wrong_shape, adapter.not_finite, adapter.canary_failed.
        """
        laps = [time.perf_counter()]

        def lap() -> float:
            laps.append(time.perf_counter())
            return laps[-1] - laps[-2]

        resolved = self._look_up(adapter) if isinstance(adapter, str) else adapter
        if isinstance(resolved, Staged):
            return dataclasses.replace(resolved, load=lap(), validate=0.0, stage=0.0, canary=0.0)
        load_s = lap()
        scaling: dict[str, float] = {}
        if resolved is not None:
            self._require_identity(resolved, expected_id)
            scaling = self._lora.check(resolved.tensors, resolved.config)
        validate_s = lap()
        with self._staging:
            on_gpu = self._lora.device.type == "cuda"
            staged_arena = Arena(self._lora.layout, torch.device("cpu"), pinned=on_gpu)
            if resolved is not None:
                self._lora.write(staged_arena, resolved.tensors, scaling)
            if self._lora.device.type != "cpu":
                device_arena = self._lora.new_arena()
                if on_gpu:  # beside the running forwards, which it neither waits for nor holds up
                    copy_stream = torch.cuda.Stream(self._lora.device)  # type: ignore[no-untyped-call]
                    # The arena's zeros are written on the current stream; the copy must not overtake them.
                    copy_stream.wait_stream(torch.cuda.current_stream(self._lora.device))
                    with torch.cuda.stream(copy_stream):
                        device_arena.copy_(staged_arena)
                    copy_stream.synchronize()
                else:
                    device_arena.copy_(staged_arena)
                staged_arena = device_arena
            effect = self._lora.effect(staged_arena)
            stage_s = lap()
            canary_actions = self._canary.actions(staged_arena, expected_actions, tolerance)
        staged_id = self.base_id if resolved is None else resolved.id
        return Staged(staged_id, staged_arena, effect, canary_actions, load_s, validate_s, stage_s, lap())

    def commit(self, staged: Staged) -> SwapReport:
        """Flip to a staged adapter between two forwards.

        Raises:
            RatchetError: adapter.busy where no forward ended in time, adapter.merged; nothing has changed then.
        """
        with self._committing:
            return self._flip(staged)

    def swap(self, adapter: Adapter | str, *, expected_id: str | None = None) -> SwapReport:
        """`stage`, then `commit`; `base` runs the base alone."""
        return self.commit(self.stage(adapter, expected_id=expected_id))

    def rollback(self) -> SwapReport:
        """Flip back to the adapter that ran before, which is still in memory.

        Raises:
            RatchetError: adapter.no_previous, adapter.busy, adapter.merged.
        """
        with self._committing:
            if self._previous is None:
                raise RatchetError(
                    "adapter.no_previous", "no adapter ran before this one", fix="swap to the one you want by id or tag"
                )
            return self._flip(dataclasses.replace(self._previous, load=0.0, validate=0.0, stage=0.0, canary=0.0))

    # -- merging -------------------------------------------------------------------------------------------------

    def merge(self) -> float:
        """Run the current adapter merged into the base weights, at the base's speed; returns seconds unavailable.

        For deployment: log-probabilities then differ by rounding from the learner's, so do not collect samples merged.

        Raises:
            RatchetError: adapter.tied_weights, adapter.not_finite, adapter.busy; nothing has changed then.
        """
        with self._committing:
            if self._merge is not None:
                return 0.0
            # The expensive part, products and new weights, happens before forwards are held off.
            merged_weights = Merge(self._lora, self._lora.arena)
            if not merged_weights.finite:
                raise RatchetError(
                    "adapter.not_finite", "merged weights overflow the base's dtype", fix="run this adapter unmerged"
                )
            interruption = self._change(merged_weights.apply)
            self._merge = merged_weights
            return interruption.seconds

    def unmerge(self) -> float:
        """Undo `merge`, bit for bit; returns seconds unavailable."""
        with self._committing:
            if self._merge is None:
                return 0.0
            interruption = self._change(self._merge.revert)
            self._merge = None
            return interruption.seconds

    # -- inside --------------------------------------------------------------------------------------------------

    def _flip(self, staged: Staged) -> SwapReport:
        if self._merge is not None:
            raise RatchetError(
                "adapter.merged", "the running adapter is merged into the base", fix="call unmerge() first"
            )
        old_staged = self._current
        flip_began_s = 0.0

        def flip() -> None:
            nonlocal flip_began_s
            flip_began_s = time.perf_counter()
            if self._mode == "flip":
                # Inside the exclusive section, so neither line allocates: pointers move, or bytes move in memory
                # that exists.
                self._lora.point_at(staged.arena)
            else:
                self._lora.arena.copy_(staged.arena)
                if self._lora.device.type != "cpu":
                    torch.cuda.synchronize(self._lora.device)
            # Set inside the exclusive section, so that `running` never yields an id that its forward did not use.
            self._current = staged

        requested_s = time.perf_counter()
        interruption = Interruption(0.0, False) if staged.id == old_staged.id else self._change(flip)
        if staged.id != old_staged.id:
            self._previous = old_staged
            self._resident[staged.id] = staged
            self._resident.move_to_end(old_staged.id)
            self._resident.move_to_end(staged.id)
            # The running and the previous adapter were just moved to the end, so they are never the ones dropped.
            while len(self._resident) > self._keep:
                self._resident.popitem(last=False)
        stage_times = {part: getattr(staged, part) for part in ("load", "validate", "stage", "canary", "ready")}
        return SwapReport(
            old_id=old_staged.id,
            new_id=staged.id,
            **stage_times,
            waited=max(flip_began_s - requested_s, 0.0),
            unavailable=interruption.seconds,
            preempted=interruption.preempted,
            effect=staged.effect.overall,
            canary_change=float((staged.canary_actions - old_staged.canary_actions).abs().max()),
            warnings=self._warnings(staged, old_staged),
        )

    def _change(self, action: Callable[[], None]) -> Interruption:
        try:
            return self._lock.write(action, self._timeout)
        except WriteTimeout as error:
            raise RatchetError(
                "adapter.busy", str(error), fix="the running adapter was kept; try again between forwards"
            ) from None

    def _look_up(self, reference: str) -> Adapter | Staged | None:
        """What a reference stands for: an adapter in memory already, one from the store, or None for the base."""
        if reference in (self.base_id, BASE):
            return None
        if self._store is None:
            raise RatchetError("adapter.no_store", "no store to look adapters up in", fix="give the swapper a store")
        adapter_id = self._store.resolve(reference)
        if adapter_id == BASE:
            return None
        return self._resident.get(adapter_id) or self._store.get(adapter_id)

    def _require_identity(self, adapter: Adapter, expected_id: str | None) -> None:
        if expected_id is not None and adapter.id != expected_id:
            raise RatchetError(
                "adapter.hash_mismatch",
                f"content is {adapter.id[:12]}, announced as {expected_id[:12]}",
                fix="send or copy the adapter again",
            )
        self._binding.require(adapter.binding, where=adapter.id[:12])

    def _warnings(self, staged: Staged, old_staged: Staged) -> tuple[Problem, ...]:
        warnings = []
        unchanged_layers = staged.effect.nil
        layer_count = len(staged.effect.layers)
        if staged.id == old_staged.id:
            warnings.append(
                Problem("adapter.already_active", staged.id[:12], "this adapter was running already", False)
            )
        if staged.id != self.base_id and len(unchanged_layers) == layer_count:
            warnings.append(
                Problem("adapter.no_effect", staged.id[:12], "it changes no weight: this is the base", False)
            )
        elif staged.id != self.base_id and unchanged_layers:
            partial_text = (
                f"{len(unchanged_layers)} of {layer_count} layers are left as the base, first {unchanged_layers[0]}"
            )
            warnings.append(Problem("adapter.partial_effect", staged.id[:12], partial_text, False))
        return tuple(warnings)
