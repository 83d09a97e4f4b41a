"""LoRA layers (PEFT) on a policy's module, with all of an adapter's tensors in one arena.

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

from ratchet_vla.adapters.identity import Adapter, Binding, canonical_config, dtype_name
from ratchet_vla.adapters.lora.arena import Arena, Layout
from ratchet_vla.errors import RatchetError

__all__ = ["Effect", "Lora", "attach", "lora_config"]

PREFIX = "base_model.model."  # how PEFT names a layer in a saved adapter
SLOT = "default"  # the name of the one adapter slot inside PEFT's layers


@dataclass(frozen=True)
class Effect:
    """How much an adapter changes the base: ||delta W|| / ||W||, Frobenius norms.

    Attributes:
        overall: over all adapted layers together.
        layers: per layer, by its path in the module.
    """

    overall: float
    layers: Mapping[str, float]

    @property
    def nil(self) -> tuple[str, ...]:
        """Layers that the adapter leaves as they are."""
        return tuple(layer_path for layer_path, relative_norm in self.layers.items() if relative_norm == 0.0)


def lora_config(rank: int, alpha: float, target_modules: str | Sequence[str] = "all-linear") -> LoraConfig:
    """A plain LoRA configuration: dropout 0 (log-probabilities must repeat), no bias.

    Args:
        target_modules: "all-linear", a regular expression over whole module names, or names and name endings.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=targets)


def room_for(config: Mapping[str, Any]) -> LoraConfig:
    """Return a configuration whose layers hold an adapter of another one.

    Its rank is the largest of the other's, its scale the other's own where no pattern says otherwise.
    """
    # Padding with zeros makes a smaller rank fit a larger one, so the room is the largest of all patterns.
    largest_rank = max([int(config["r"]), *(int(pattern_rank) for pattern_rank in config["rank_pattern"].values())])
    if largest_rank == config["r"] and not config["use_rslora"]:
        alpha = float(config["lora_alpha"])
    else:
        # Another rank: alpha is chosen so that alpha / rank is the scale that the configuration meant.
        alpha = largest_rank * scaling_of({**config, "rank_pattern": {}, "alpha_pattern": {}}, "")
    targets = config["target_modules"]
    if isinstance(targets, str):
        pattern = targets
    else:
        # PEFT reads a list as whole names or name endings; the same as a regular expression.
        pattern = "|".join(rf"(.*\.)?{re.escape(target)}" for target in sorted(targets))
    return lora_config(largest_rank, alpha, pattern)


def attach(module: nn.Module, config: LoraConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Lora:
    """Put LoRA layers into a module, in place, and freeze everything else.

    Args:
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
    if any(isinstance(submodule, LoraLayer) for submodule in module.modules()):
        raise RatchetError("adapter.already_attached", "the module already carries LoRA layers", fix="attach once")
    try:
        # A copy, because PEFT resolves target_modules in the configuration it is given.
        inject_adapter_in_model(copy.deepcopy(config), module, SLOT)
    except ValueError as error:
        raise RatchetError(
            "adapter.no_layers",
            str(error).split(". ")[0],
            where=f"target_modules={config.target_modules}",
            fix='name linear layers of the policy, or "all-linear"',
        ) from None
    # Nothing but A and B may be trained, whatever the module came with.
    module.requires_grad_(False)
    for lora_layer in _lora_layers(module).values():
        for half_module in (lora_layer.lora_A, lora_layer.lora_B):
            half_module[SLOT].to(dtype).requires_grad_(True)
    attached_lora = Lora(module, config)
    attached_lora.reset(seed)
    return attached_lora


class Lora:
    """The LoRA layers of one module and the arena their parameters currently point at."""

    def __init__(self, module: nn.Module, config: LoraConfig) -> None:
        """Take charge of LoRA layers that are already in the module; `attach` puts them there."""
        self.module = module
        self.layers = _lora_layers(module)
        if not self.layers:
            raise RatchetError("adapter.no_layers", "the module carries no LoRA layers", fix="call attach() first")
        for layer_path, lora_layer in self.layers.items():
            supported = type(lora_layer) is Linear or (
                type(lora_layer) is Conv2d and lora_layer.get_base_layer().groups == 1
            )
            if not supported:
                raise RatchetError(
                    "adapter.unsupported_layer",
                    f"{type(lora_layer.get_base_layer()).__name__} cannot carry an adapter here",
                    where=layer_path,
                    fix="target linear layers and ungrouped 2-D convolutions only",
                )
        self._loaded: dict[str, torch.dtype] = {}  # what the running adapter was stored in, where that is narrower
        self.parameters: dict[str, nn.Parameter] = {}
        for layer_path, lora_layer in self.layers.items():
            for half_name in ("lora_A", "lora_B"):
                self.parameters[tensor_name(layer_path, half_name)] = getattr(lora_layer, half_name)[SLOT].weight
        self.scaling = {layer_path: float(lora_layer.scaling[SLOT]) for layer_path, lora_layer in self.layers.items()}
        self.config = canonical_config({**config.to_dict(), "target_modules": self._targets()})
        self.layout = Layout(self.parameters)
        # From here on the parameters are views of one block; what PEFT initialised is copied over.
        first_arena = self.new_arena()
        for peft_name, parameter in self.parameters.items():
            first_arena.views[peft_name].copy_(parameter.data)
        self.arena = first_arena
        self.point_at(first_arena)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's parameters in sorted order of their names; everything else is frozen."""
        return [self.parameters[peft_name] for peft_name in sorted(self.parameters)]

    def reset(self, seed: int) -> None:
        """A to Kaiming uniform from a generator of its own, B to zero: the base's behaviour."""
        self._loaded = {}
        generator = torch.Generator().manual_seed(seed)
        for peft_name in sorted(self.parameters):
            parameter = self.parameters[peft_name]
            if ".lora_B." in peft_name:
                parameter.data.zero_()
                continue
            # Kaiming uniform with a = sqrt(5), as PEFT: the bound is 1 / sqrt(fan_in). Drawn on the CPU, so that a
            # seed gives the same A on every device.
            uniform_bound = 1.0 / math.sqrt(parameter[0].numel())
            initial_values = torch.rand(parameter.shape, generator=generator) * (2 * uniform_bound) - uniform_bound
            parameter.data.copy_(initial_values)

    def export(self) -> dict[str, Tensor]:
        """The running adapter as PEFT names it, copied to the CPU.

        An adapter that was stored in a narrower dtype and has not changed since is given as it was stored, so that it
        keeps its id; once trained it is float32.
        """
        tensors = {
            peft_name: self.parameters[peft_name].detach().cpu().clone() for peft_name in sorted(self.parameters)
        }
        if not self._loaded:
            return tensors
        narrowed = {peft_name: tensor.to(self._loaded[peft_name]) for peft_name, tensor in tensors.items()}
        unchanged = all(
            torch.equal(narrowed[peft_name].to(tensor.dtype), tensor) for peft_name, tensor in tensors.items()
        )
        return narrowed if unchanged else tensors

    def adapter(self, binding: Binding) -> Adapter:
        """The running adapter as an immutable value with an id."""
        return Adapter(self.export(), self.config, binding)

    def new_arena(self) -> Arena:
        return Arena(self.layout, self.device)

    def point_at(self, arena: Arena) -> None:
        """Make the layers use another arena. No copy: optimisers keep their parameters, tensors change under them."""
        for peft_name, parameter in self.parameters.items():
            parameter.data = arena.views[peft_name]
        self.arena = arena

    def load(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
        """Copy an adapter into the running arena; refused before the first write as in `check`."""
        self.write(self.arena, tensors, self.check(tensors, config if config is not None else self.config))
        is_narrower = any(
            tensors[peft_name].dtype != parameter.dtype for peft_name, parameter in self.parameters.items()
        )
        self._loaded = {}
        if is_narrower:
            self._loaded = {peft_name: tensors[peft_name].dtype for peft_name in self.parameters}

    def write(self, arena: Arena, tensors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> None:
        """Write an adapter that `check` passed, with the scaling it returned, into an arena.

        A smaller rank is padded with zeros and another alpha is folded into B, so that shapes and scaling never change.
        """
        # No allocation of arena memory here: every view exists, tensors are copied into it.
        for peft_name, target_view in arena.views.items():
            source = tensors[peft_name]
            layer_path, half_name = split_name(peft_name)
            if half_name == "lora_B" and scaling[layer_path] != self.scaling[layer_path]:
                source = source.float() * (scaling[layer_path] / self.scaling[layer_path])
            if source.shape == target_view.shape:
                target_view.copy_(source.detach())
                continue
            # Rows of A and columns of B beyond the smaller rank are zero, so their product adds nothing.
            target_view.zero_()
            if half_name == "lora_A":
                target_view[: source.shape[0]].copy_(source.detach())
            else:
                target_view[:, : source.shape[1]].copy_(source.detach())

    def check(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
        """Refuse an adapter that does not fit these layers; returns its scaling per layer. Writes nothing.

        Raises:
            RatchetError: adapter.missing_keys, adapter.extra_keys, adapter.wrong_dtype, adapter.wrong_shape,
                adapter.not_finite, adapter.unsupported_config.
        """
        config = canonical_config(config)
        _check_keys(self.parameters.keys(), tensors.keys())
        scaling_by_layer: dict[str, float] = {}
        for peft_name in sorted(self.parameters):
            candidate = tensors[peft_name]
            parameter = self.parameters[peft_name]
            layer_path, half_name = split_name(peft_name)
            # Narrower than the layer is fine, every value survives; wider would be rounded silently.
            if (
                not torch.can_cast(candidate.dtype, parameter.dtype)
                or candidate.element_size() > parameter.element_size()
            ):
                raise RatchetError(
                    "adapter.wrong_dtype",
                    f"{dtype_name(candidate, peft_name)} does not fit into "
                    f"{dtype_name(parameter, peft_name)} without loss",
                    where=peft_name,
                    fix="attach the LoRA layers in float32",
                )
            stated_rank = _pattern(config["rank_pattern"], layer_path, config["r"])
            rank_axis = 0 if half_name == "lora_A" else 1
            expected_shape = list(parameter.shape)
            expected_shape[rank_axis] = stated_rank
            if list(candidate.shape) != expected_shape or stated_rank > parameter.shape[rank_axis]:
                raise RatchetError(
                    "adapter.wrong_shape",
                    f"shape {tuple(candidate.shape)}, rank {stated_rank} in its configuration, "
                    f"layer takes {tuple(parameter.shape)}",
                    where=peft_name,
                    fix="use an adapter of this base and of at most the rank that was attached",
                )
            if not bool(torch.isfinite(candidate).all()):
                raise RatchetError(
                    "adapter.not_finite", "NaN or infinity among the weights", where=peft_name, fix="train it again"
                )
            scaling_by_layer[layer_path] = scaling_of(config, layer_path)
        return scaling_by_layer

    def effect(self, arena: Arena | None = None) -> Effect:
        """How much the adapter in an arena (default: the running one) changes each layer; cost is a rank's, not W's."""
        views = (arena or self.arena).views
        relative_norms: dict[str, float] = {}
        total_squared = 0.0
        for layer_path in self.layers:
            lora_a = views[tensor_name(layer_path, "lora_A")].flatten(1).double()
            lora_b = views[tensor_name(layer_path, "lora_B")].flatten(1).double()
            # ||B A||^2 = trace((B^T B) (A A^T)), which never builds the (out, in) product.
            delta_squared = (
                float(((lora_b.T @ lora_b) * (lora_a @ lora_a.T)).sum().clamp_min(0.0)) * self.scaling[layer_path] ** 2
            )
            total_squared += delta_squared
            relative_norms[layer_path] = math.sqrt(delta_squared) / max(self._base_norms[layer_path], 1e-30)
        base_norm = math.sqrt(sum(layer_norm * layer_norm for layer_norm in self._base_norms.values()))
        return Effect(math.sqrt(total_squared) / max(base_norm, 1e-30), relative_norms)

    @cached_property
    def _base_norms(self) -> dict[str, float]:
        return {
            layer_path: float(
                torch.linalg.vector_norm(lora_layer.get_base_layer().weight.detach(), dtype=torch.float32)
            )
            for layer_path, lora_layer in self.layers.items()
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model alone inside this block; not for use beside another thread's forward."""
        for lora_layer in self.layers.values():
            lora_layer._disable_adapters = True
        try:
            yield
        finally:
            for lora_layer in self.layers.values():
                lora_layer._disable_adapters = False

    def _targets(self) -> str | list[str]:
        """`target_modules` that makes PEFT find exactly these layers again."""
        module_paths = [
            module_path
            for module_path, _ in self.module.named_modules()
            if module_path and ".base_layer" not in module_path
        ]
        peft_suffixes = (".lora_A", ".lora_B", ".lora_dropout", ".lora_embedding", ".lora_magnitude")
        module_paths = [
            module_path for module_path in module_paths if not any(suffix in module_path for suffix in peft_suffixes)
        ]
        # PEFT matches list entries as name endings, so an entry may catch a layer that carries no adapter.
        endings = tuple("." + layer_path for layer_path in self.layers)
        matched_paths = {path for path in module_paths if path in self.layers or path.endswith(endings)}
        if matched_paths == set(self.layers):
            return sorted(self.layers)
        return "(" + "|".join(sorted(layer_path.replace(".", r"\.") for layer_path in self.layers)) + ")"


def tensor_name(layer_path: str, half_name: str) -> str:
    """PEFT's name of one half of a layer's adapter: half is `lora_A` or `lora_B`."""
    return f"{PREFIX}{layer_path}.{half_name}.weight"


def split_name(peft_name: str) -> tuple[str, str]:
    """Inverse of `tensor_name`."""
    layer_path, half_name, _ = peft_name.removeprefix(PREFIX).rsplit(".", 2)
    return layer_path, half_name


def peft_config(config: Mapping[str, Any]) -> LoraConfig:
    """PEFT's own configuration object for a canonical one."""
    return LoraConfig(**{field_name: setting for field_name, setting in config.items() if field_name != "peft_type"})


def _lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    return {
        layer_path: submodule for layer_path, submodule in module.named_modules() if isinstance(submodule, LoraLayer)
    }


def scaling_of(config: Mapping[str, Any], layer_path: str) -> float:
    """The factor of B A in one layer, as a canonical configuration says."""
    rank = _pattern(config["rank_pattern"], layer_path, config["r"])
    alpha = _pattern(config["alpha_pattern"], layer_path, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config["use_rslora"] else float(rank))


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The adapter whose change of every layer is `factor` times this one's: 0 is the base, 1 this adapter.

    Raises:
        RatchetError: adapter.bad_scale for a factor that is no number, or below zero.
    """
    if not (math.isfinite(factor) and factor >= 0):
        raise RatchetError("adapter.bad_scale", f"factor {factor}", fix="a number of at least 0")
    # B alone is scaled: the change is B A, so scaling both would square the factor.
    tensors = dict(adapter.tensors)
    for peft_name, tensor in adapter.tensors.items():
        if split_name(peft_name)[1] == "lora_B":
            tensors[peft_name] = (factor * tensor.float()).to(tensor.dtype)
    return Adapter(tensors, adapter.config, adapter.binding)


def _pattern(value_by_pattern: Mapping[str, Any], layer_path: str, default: Any) -> Any:
    return value_by_pattern.get(get_pattern_key(value_by_pattern.keys(), layer_path), default)


def _check_keys(expected_names: Any, given_names: Any) -> None:
    missing_names = sorted(set(expected_names) - set(given_names))
    extra_names = sorted(set(given_names) - set(expected_names))
    if missing_names:
        raise RatchetError(
            "adapter.missing_keys",
            f"{len(missing_names)} of {len(set(expected_names))} tensors are missing: {json.dumps(missing_names[:3])}",
            fix="export the whole adapter; layers without one would silently stay the base",
        )
    if extra_names:
        raise RatchetError(
            "adapter.extra_keys",
            f"{len(extra_names)} tensors belong to no adapted layer: {json.dumps(extra_names[:3])}",
            fix="attach LoRA to the same layers, and save with save_embedding_layers=False",
        )
