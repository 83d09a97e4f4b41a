"""PEFT LoRA layers on a policy's module, with all of an adapter's tensors in one arena.

Knows how LoRA is attached, named, checked against its layers, exported and measured. Knows no store, no lock and no
learning algorithm: `hotswap` decides when the running tensors change, the learner how.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Conv2d, Linear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from agent.adapters.arena import Arena, Layout
from agent.adapters.identity import Adapter, Binding, canonical_config, dtype_name
from agent.errors import RatchetError

PREFIX = "base_model.model."  # how PEFT names a layer in a saved adapter
SLOT = "default"  # the name of the one adapter slot inside PEFT's layers


@dataclass(frozen=True)
class Effect:
    """How much an adapter changes the base: ||delta W|| / ||W||, Frobenius norms.

    overall: over all adapted layers together; layers: per layer; nil: layers whose delta is zero.
    """

    overall: float
    layers: Mapping[str, float]

    @property
    def nil(self) -> tuple[str, ...]:
        return tuple(name for name, value in self.layers.items() if value == 0.0)


def lora_config(rank: int, alpha: float, target_modules: str | Sequence[str] = "all-linear") -> LoraConfig:
    """A plain LoRA configuration: dropout 0 (log-probabilities must repeat), no bias.

    target_modules: "all-linear", a regular expression over whole module names, or names and name endings.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=targets)


def room_for(config: Mapping[str, Any]) -> LoraConfig:
    """A configuration whose layers hold an adapter of another one: its largest rank, its own scale where no pattern
    says otherwise, and its layers."""
    rank = max([int(config["r"]), *(int(r) for r in config["rank_pattern"].values())])
    same = rank == config["r"] and not config["use_rslora"]
    alpha = (
        float(config["lora_alpha"])
        if same
        else rank * scaling_of({**config, "rank_pattern": {}, "alpha_pattern": {}}, "")
    )
    targets = config["target_modules"]
    pattern = targets if isinstance(targets, str) else "|".join(rf"(.*\.)?{re.escape(t)}" for t in sorted(targets))
    return lora_config(rank, alpha, pattern)


def attach(module: nn.Module, config: LoraConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Lora:
    """Put LoRA layers into a module, in place, and freeze everything else.

    dtype: of the adapter's tensors. float32 whatever the base has and computes in: at a learning rate of 2e-5 most
        steps of half of A are smaller than bfloat16 can hold, so that they are lost.
    seed: of A's initial values (Kaiming uniform, as PEFT); B starts at zero, so that the output is the base's.

    Raises:
        RatchetError: adapter.unsupported_config; adapter.no_layers where no layer matches; adapter.unsupported_layer
            for a matched layer that is neither linear nor an ungrouped 2-D convolution; adapter.already_attached.
    """
    canonical_config(config.to_dict(), where="LoraConfig")
    if config.lora_dropout:
        raise RatchetError(
            "adapter.unsupported_config",
            f"lora_dropout={config.lora_dropout} would make log-probabilities random",
            fix="set lora_dropout to 0",
        )
    if any(isinstance(m, LoraLayer) for m in module.modules()):
        raise RatchetError("adapter.already_attached", "the module already carries LoRA layers", fix="attach once")
    try:
        inject_adapter_in_model(copy.deepcopy(config), module, SLOT)
    except ValueError as error:
        raise RatchetError(
            "adapter.no_layers",
            str(error).split(". ")[0],
            where=f"target_modules={config.target_modules}",
            fix='name linear layers of the policy, or "all-linear"',
        ) from None
    module.requires_grad_(False)
    for layer in _lora_layers(module).values():
        for half in (layer.lora_A, layer.lora_B):
            half[SLOT].to(dtype).requires_grad_(True)
    lora = Lora(module, config)
    lora.reset(seed)
    return lora


class Lora:
    """The LoRA layers of one module and the arena their parameters currently point at."""

    def __init__(self, module: nn.Module, config: LoraConfig) -> None:
        """Take charge of LoRA layers that are already in the module; `attach` puts them there."""
        self.module = module
        self.layers = _lora_layers(module)
        if not self.layers:
            raise RatchetError("adapter.no_layers", "the module carries no LoRA layers", fix="call attach() first")
        for path, layer in self.layers.items():
            plain = type(layer) is Linear or (type(layer) is Conv2d and layer.get_base_layer().groups == 1)
            if not plain:
                raise RatchetError(
                    "adapter.unsupported_layer",
                    f"{type(layer.get_base_layer()).__name__} cannot carry an adapter here",
                    where=path,
                    fix="target linear layers and ungrouped 2-D convolutions only",
                )
        self._loaded: dict[str, torch.dtype] = {}  # what the running adapter was stored in, where that is narrower
        self.parameters: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            for half in ("lora_A", "lora_B"):
                self.parameters[tensor_name(path, half)] = getattr(layer, half)[SLOT].weight
        self.scaling = {path: float(layer.scaling[SLOT]) for path, layer in self.layers.items()}
        self.config = canonical_config({**config.to_dict(), "target_modules": self._targets()})
        self.layout = Layout(self.parameters)
        start = self.new_arena()
        for name, parameter in self.parameters.items():
            start.views[name].copy_(parameter.data)
        self.arena = start
        self.point_at(start)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's parameters in sorted order of their names; everything else is frozen."""
        return [self.parameters[name] for name in sorted(self.parameters)]

    def reset(self, seed: int) -> None:
        """A to Kaiming uniform from a generator of its own, B to zero: the base's behaviour."""
        self._loaded = {}
        generator = torch.Generator().manual_seed(seed)
        for name in sorted(self.parameters):
            parameter = self.parameters[name]
            if ".lora_B." in name:
                parameter.data.zero_()
                continue
            bound = 1.0 / math.sqrt(parameter[0].numel())
            values = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
            parameter.data.copy_(values)

    def export(self) -> dict[str, Tensor]:
        """The running adapter as PEFT names it, copied to the CPU.

        An adapter that was stored in a narrower dtype and has not changed since is given as it was stored, so that it
        keeps its id; once trained it is float32.
        """
        tensors = {name: self.parameters[name].detach().cpu().clone() for name in sorted(self.parameters)}
        if not self._loaded:
            return tensors
        stored = {name: tensor.to(self._loaded[name]) for name, tensor in tensors.items()}
        same = all(torch.equal(stored[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())
        return stored if same else tensors

    def adapter(self, binding: Binding) -> Adapter:
        """The running adapter as an immutable value with an id."""
        return Adapter(self.export(), self.config, binding)

    def new_arena(self) -> Arena:
        return Arena(self.layout, self.device)

    def point_at(self, arena: Arena) -> None:
        """Make the layers use another arena. No copy: optimisers keep their parameters, tensors change under them."""
        for name, parameter in self.parameters.items():
            parameter.data = arena.views[name]
        self.arena = arena

    def load(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
        """Copy an adapter into the running arena; refused before the first write as in `check`."""
        self.write(self.arena, tensors, self.check(tensors, config if config is not None else self.config))
        narrow = any(tensors[name].dtype != own.dtype for name, own in self.parameters.items())
        self._loaded = {name: tensors[name].dtype for name in self.parameters} if narrow else {}

    def write(self, arena: Arena, tensors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> None:
        """Write an adapter that `check` passed, with the scaling it returned, into an arena.

        A smaller rank is padded with zeros and another alpha is folded into B, so that shapes and scaling never change.
        """
        for name, view in arena.views.items():
            source = tensors[name]
            path, half = split_name(name)
            if half == "lora_B" and scaling[path] != self.scaling[path]:
                source = source.float() * (scaling[path] / self.scaling[path])
            if source.shape == view.shape:
                view.copy_(source.detach())
                continue
            view.zero_()
            rank = source.shape[0] if half == "lora_A" else source.shape[1]
            (view[:rank] if half == "lora_A" else view[:, :rank]).copy_(source.detach())

    def check(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
        """Refuse an adapter that does not fit these layers; returns its scaling per layer. Writes nothing.

        Raises:
            RatchetError: adapter.missing_keys, adapter.extra_keys, adapter.wrong_dtype, adapter.wrong_shape,
                adapter.not_finite, adapter.unsupported_config.
        """
        config = canonical_config(config)
        _check_keys(self.parameters.keys(), tensors.keys())
        scaling: dict[str, float] = {}
        for name in sorted(self.parameters):
            theirs, mine = tensors[name], self.parameters[name]
            path, half = split_name(name)
            if not torch.can_cast(theirs.dtype, mine.dtype) or theirs.element_size() > mine.element_size():
                raise RatchetError(
                    "adapter.wrong_dtype",
                    f"{dtype_name(theirs, name)} does not fit into {dtype_name(mine, name)} without loss",
                    where=name,
                    fix="attach the LoRA layers in float32",
                )
            rank = _pattern(config["rank_pattern"], path, config["r"])
            axis = 0 if half == "lora_A" else 1
            expected = tuple(rank if i == axis else n for i, n in enumerate(mine.shape))
            if tuple(theirs.shape) != expected or rank > mine.shape[axis]:
                raise RatchetError(
                    "adapter.wrong_shape",
                    f"shape {tuple(theirs.shape)}, rank {rank} in its configuration, layer takes {tuple(mine.shape)}",
                    where=name,
                    fix="use an adapter of this base and of at most the rank that was attached",
                )
            if not bool(torch.isfinite(theirs).all()):
                raise RatchetError(
                    "adapter.not_finite", "NaN or infinity among the weights", where=name, fix="train it again"
                )
            scaling[path] = scaling_of(config, path)
        return scaling

    def effect(self, arena: Arena | None = None) -> Effect:
        """How much the adapter in an arena (default: the running one) changes each layer; cost is a rank's, not W's."""
        views = (arena or self.arena).views
        layers: dict[str, float] = {}
        total = 0.0
        for path in self.layers:
            a = views[tensor_name(path, "lora_A")].flatten(1).double()
            b = views[tensor_name(path, "lora_B")].flatten(1).double()
            # ||B A||^2 = trace((B^T B) (A A^T)), which never builds the (out, in) product.
            squared = float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0.0)) * self.scaling[path] ** 2
            total += squared
            layers[path] = math.sqrt(squared) / max(self._base_norms[path], 1e-30)
        norm = math.sqrt(sum(n * n for n in self._base_norms.values()))
        return Effect(math.sqrt(total) / max(norm, 1e-30), layers)

    @cached_property
    def _base_norms(self) -> dict[str, float]:
        return {
            path: float(torch.linalg.vector_norm(layer.get_base_layer().weight.detach(), dtype=torch.float32))
            for path, layer in self.layers.items()
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model alone inside this block; not for use beside another thread's forward."""
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False

    def _targets(self) -> str | list[str]:
        """`target_modules` that makes PEFT find exactly these layers again."""
        names = [path for path, _ in self.module.named_modules() if path and ".base_layer" not in path]
        inner = (".lora_A", ".lora_B", ".lora_dropout", ".lora_embedding", ".lora_magnitude")
        names = [n for n in names if not any(part in n for part in inner)]
        # PEFT matches list entries as name endings, so an entry may catch a layer that carries no adapter.
        caught = {n for n in names for p in self.layers if n == p or n.endswith("." + p)}
        if caught == set(self.layers):
            return sorted(self.layers)
        return "(" + "|".join(sorted(p.replace(".", r"\.") for p in self.layers)) + ")"


def tensor_name(path: str, half: str) -> str:
    """PEFT's name of one half of a layer's adapter: half is `lora_A` or `lora_B`."""
    return f"{PREFIX}{path}.{half}.weight"


def split_name(name: str) -> tuple[str, str]:
    """Inverse of `tensor_name`."""
    path, half, _ = name.removeprefix(PREFIX).rsplit(".", 2)
    return path, half


def peft_config(config: Mapping[str, Any]) -> LoraConfig:
    """PEFT's own configuration object for a canonical one."""
    return LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})


def _lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def scaling_of(config: Mapping[str, Any], path: str) -> float:
    """The factor of B A in one layer, as a canonical configuration says."""
    rank = _pattern(config["rank_pattern"], path, config["r"])
    alpha = _pattern(config["alpha_pattern"], path, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config["use_rslora"] else float(rank))


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The adapter whose change of every layer is `factor` times this one's: 0 is the base, 1 this adapter.

    Raises:
        RatchetError: adapter.bad_scale for a factor that is no number, or below zero.
    """
    if not (math.isfinite(factor) and factor >= 0):
        raise RatchetError("adapter.bad_scale", f"factor {factor}", fix="a number of at least 0")
    tensors = {
        name: t if split_name(name)[1] == "lora_A" else (factor * t.float()).to(t.dtype)
        for name, t in adapter.tensors.items()
    }
    return Adapter(tensors, adapter.config, adapter.binding)


def _pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(pattern.keys(), path), default)


def _check_keys(mine: Any, theirs: Any) -> None:
    missing, extra = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    if missing:
        raise RatchetError(
            "adapter.missing_keys",
            f"{len(missing)} of {len(set(mine))} tensors are missing: {json.dumps(missing[:3])}",
            fix="export the whole adapter; layers without one would silently stay the base",
        )
    if extra:
        raise RatchetError(
            "adapter.extra_keys",
            f"{len(extra)} tensors belong to no adapted layer: {json.dumps(extra[:3])}",
            fix="attach LoRA to the same layers, and save with save_embedding_layers=False",
        )
