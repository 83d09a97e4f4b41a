"""One chunk as fast as the device gives it: fixed shapes, images seen once, prompts prepared once, CUDA graphs.

Knows the two stages of a policy's answer, seeing and acting, and when each has to run again: images that are the same
object as before are not seen again, and what depends on the instruction alone is kept until it changes. On a GPU both
stages are captured once and replayed, so that Python and kernel launches cost nothing; adapters must then be exchanged
by copying into the same memory (`HotSwapper(mode="copy")`). On a CPU the same stages run as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.action_tokens import unnormalise
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.flow import rtc
from ratchet_vla.policy.flow import sde as flow_sde
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.protocol import Chunks, PolicyInput

LIMIT = 10.0  # largest pull of a guide, a constant of the captured graph: `rtc.Guide`'s own


class Stage:
    """A function over fixed tensors; on a GPU captured into a graph at its first run, replayed after."""

    def __init__(self, function: Callable[[], Tensor], capture: bool) -> None:
        self._function = function
        self._capture = capture
        self._graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None

    def run(self) -> Tensor:
        if not self._capture:
            self.out = self._function()
            return self.out
        if self._graph is None:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries choose and allocate before the capture, not in it
                    self._function()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Another thread may copy a staged adapter meanwhile; only this one is captured.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.out = self._function()
        self._graph.replay()
        assert self.out is not None
        return self.out


class StaticPredictor:
    """`predict(batch)` for a fixed number of rows; the same numbers as the policy's own, up to the order of sums.

    capture: use CUDA graphs; None does on a GPU.

    Raises:
        RatchetError: policy.no_static for autoregressive decoding, whose steps depend on each other, and for a guide
        that differentiates through the network.
    """

    def __init__(self, policy: PrismaticPolicy | FlowPolicy, capture: bool | None = None) -> None:
        if isinstance(policy, PrismaticPolicy) and policy.config.decoding == "autoregressive":
            raise RatchetError(
                "policy.no_static", "one token after another has no fixed shape", fix="use the policy's own predict"
            )
        self.policy = policy
        self._capture = policy.device.type == "cuda" if capture is None else capture
        self._words: tuple[str, ...] = ()
        self._images: object = None
        self._fixed: dict[str, Tensor] = {}
        self._see: Stage | None = None
        self._act: Stage | None = None
        self._pinned: Tensor | None = None
        self.seen = 0  # how often the vision towers ran

    @torch.no_grad()
    def chunks(self, batch: PolicyInput, guide: rtc.Guide | None = None) -> Chunks:
        """What the policy's own `predict` gives, without the feature.

        guide: of a flow policy, what the chunk goes on from; with and without, the same stages run.
        """
        policy = self.policy
        if guide is not None and (guide.exact or guide.limit != LIMIT or not isinstance(policy, FlowPolicy)):
            raise RatchetError("policy.no_static", "this guide has no fixed shape", fix="use the policy's own predict")
        same_images = batch.images is self._images and self._images is not None
        images = batch.images
        staged = PolicyInput(self._staged(images), batch.state, batch.instructions)
        pixels, ids, mask, state = policy.inputs(staged)
        given = {"pixels": pixels, "ids": ids, "mask": mask}
        if state is not None:
            given["state"] = state
        if isinstance(policy, FlowPolicy):
            given |= _pull(policy, guide, len(ids))
        words = tuple(batch.instructions)
        fits = all(name in self._fixed and self._fixed[name].shape == t.shape for name, t in given.items())
        if not fits or self._see is None or (words != self._words and isinstance(policy, PrismaticPolicy)):
            self._fixed = {name: t.clone() for name, t in given.items()}
            self._build()
            same_images = False
        else:
            for name, tensor in given.items():
                if name != "pixels" or not same_images:
                    self._fixed[name].copy_(tensor)
            same_images = same_images and words == self._words
        self._words = words
        self._images = images
        assert self._see is not None
        assert self._act is not None
        if not same_images:
            self._see.run()
            self.seen += 1
        return self._chunks(self._act.run())

    def predict(self, batch: PolicyInput, guide: rtc.Guide | None = None) -> Tensor:
        """(B, K, D) float32 actions of `chunks`, physical units."""
        return self.chunks(batch, guide).actions

    def _build(self) -> None:
        policy = self.policy
        f = self._fixed
        state = f.get("state")
        dtype = policy.compute_dtype
        if isinstance(policy, FlowPolicy):
            flow = policy.network
            start = policy.start(len(f["ids"])).contiguous()

            def see_flow() -> Tensor:
                with policy.autocast():
                    return flow.see(f["pixels"], f["ids"], f["mask"])

            self._see = Stage(see_flow, self._capture)
            seen = self._see

            def act_flow() -> Tensor:
                with policy.autocast():
                    prefix = flow.prefix(f["pixels"], f["ids"], f["mask"], state, dtype, seen.out)
                velocity = rtc.drawn(policy.velocity(prefix), f["previous"], f["weight"], LIMIT)
                return flow_sde.integrate(velocity, start, policy.config.steps)

            self._act = Stage(act_flow, self._capture)
            return
        network = policy.network

        def see() -> Tensor:
            with policy.autocast():
                return network.see(f["pixels"], f["ids"], f["mask"], dtype)

        self._see = Stage(see, self._capture)
        patches = self._see
        with policy.autocast():
            prefix, known = network.prefix(f["pixels"], f["ids"], f["mask"], state, dtype)
        rope = network.rope_mask(known, dtype)
        length = prefix.shape[1] + policy.actions
        query_slice = slice(length - policy.actions - 1, length - 1)

        def act() -> Tensor:
            with policy.autocast():
                before, _ = network.prefix(f["pixels"], f["ids"], f["mask"], state, dtype, patches.out)
                sequence = torch.cat([before, network.slots(before, None)], 1)
                hidden = network.language_model.model(sequence, rope, query_slice, dtype)
                if policy.config.head == "l1":
                    values: Tensor = network.action_head(hidden).float()
                    return values
                return network.action_logits(hidden).argmax(-1)

        self._act = Stage(act, self._capture)

    def _chunks(self, out: Tensor) -> Chunks:
        policy = self.policy
        tokens = None
        if isinstance(policy, FlowPolicy):
            actions = policy.actions_of(out)
        elif policy.config.head == "l1":
            actions = unnormalise(out, policy.statistics).float()
        else:
            tokens = out.view(len(out), policy.spec.chunk, -1).clone()  # the graph writes there again
            actions = policy.actions_of(tokens)
        sure = policy.gives_probabilities
        return Chunks(actions, tokens, torch.zeros(actions.shape, device=actions.device) if sure else None)

    def _staged(self, images: object) -> Tensor:
        """Images on the device, through page-locked memory where that is another machine's part."""
        tensor = torch.as_tensor(images)
        if self.policy.device.type != "cuda" or tensor.device.type == "cuda":
            return tensor
        if self._pinned is None or self._pinned.shape != tensor.shape:
            self._pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._pinned.copy_(tensor)
        return self._pinned.to(self.policy.device, non_blocking=True)


def _pull(policy: FlowPolicy, guide: rtc.Guide | None, rows: int) -> dict[str, Tensor]:
    """The guide's tensors; zeros where nothing pulls."""
    like = torch.zeros(rows, policy.config.horizon, policy.config.action_width, device=policy.device)
    if guide is None:
        return {"previous": like, "weight": torch.zeros(1, policy.config.horizon, 1, device=policy.device)}
    previous, weight = rtc.fields(guide, like)
    return {"previous": previous, "weight": weight}
