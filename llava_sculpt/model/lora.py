"""LoRA on the LLM's linear layers, the connector's four modes, and the (A, B, W) triples the method works on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from llava_sculpt.errors import UserError

# PEFT asks every model for it; transformers 5 has renamed it.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# Anchored to the LLM: CLIP has q_proj, k_proj and v_proj too.
LLM_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
CONNECTOR_TARGETS = r".*multi_modal_projector\.linear_[12]"
REGULARIZED_LLM = r".*language_model.*\.(q_proj|k_proj|v_proj)"
CONNECTOR = "multi_modal_projector"
ADAPTER = "default"


@dataclass(frozen=True)
class LoraPair:
    """One adapted linear layer, as the method sees it.

    Attributes:
        name: module path inside the PEFT model.
        lora_A: parameter (r, q). lora_B: parameter (p, r).
        magnitude: DoRA's parameter (p,), the norm of each row of the adapted weight; None without DoRA.
        layer: the PEFT layer that holds them and the frozen weight W (p, q).
    """

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    layer: LoraLayer

    @property
    def in_connector(self) -> bool:
        return CONNECTOR in self.name

    def weight(self) -> torch.Tensor:
        """The frozen W (p, q); a 4- or 8-bit weight is dequantised into a temporary."""
        base: Any = self.layer.get_base_layer()
        weight = base.weight
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            return dequantize_bnb_weight(weight, state=getattr(base, "state", None))
        return weight

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key in adapter_model.safetensors, parameter) of A, of B, and of DoRA's magnitude if there is one."""
        yield f"{self.name}.lora_A.weight", self.lora_A
        yield f"{self.name}.lora_B.weight", self.lora_B
        if self.magnitude is not None:
            yield f"{self.name}.lora_magnitude_vector", self.magnitude


def inject_lora(
    model: nn.Module, *, r: int, lora_alpha: float, dropout: float, connector: str, use_dora: bool = False
) -> PeftModel:
    """Wrap a frozen base model in LoRA (Eq. 1) and set what of the connector trains.

    Args:
        model: LlavaForConditionalGeneration with all parameters frozen.
        connector: full (its own weights train), frozen, lora or sculpt (both: LoRA on its two linear layers).
        use_dora: DoRA in place of LoRA everywhere: the norm of each row of the adapted weight trains by itself.

    Returns:
        PEFT model; LoRA and, with `full`, the connector's weights are float32 and trainable, nothing else is.
    """
    with_connector = connector in ("lora", "sculpt")
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # a float is fine, the annotation is narrower
        lora_dropout=dropout,
        target_modules=f"({LLM_TARGETS})|({CONNECTOR_TARGETS})" if with_connector else LLM_TARGETS,
        bias="none",
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    if connector == "full":
        for parameter in connector_module(peft_model).parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return peft_model


def connector_module(model: nn.Module) -> nn.Module:
    """The connector (two-layer MLP) inside a base or PEFT model."""
    return next(module for name, module in model.named_modules() if name.endswith(CONNECTOR))


def connector_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The connector's own weights by their names in the base model (`model.multi_modal_projector.linear_1.weight`)."""
    return {
        f"model.{CONNECTOR}.{name}": parameter
        for name, parameter in connector_module(model).named_parameters()
        if "lora_" not in name
    }


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Every adapted layer, in module order (the same on every rank)."""
    pairs = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            lora_A: Any = module.lora_A[ADAPTER]
            lora_B: Any = module.lora_B[ADAPTER]
            magnitudes: Any = module.lora_magnitude_vector  # None in peft 0.10 before any layer has DoRA
            magnitude = magnitudes[ADAPTER].weight if module.use_dora[ADAPTER] else None
            pairs.append(LoraPair(name, lora_A.weight, lora_B.weight, magnitude, module))
    return pairs


def matching_pairs(pairs: list[LoraPair], pattern: str, purpose: str) -> list[LoraPair]:
    """The pairs whose module name in the base model is matched, as a whole, by a regular expression.

    That is how PEFT reads a `target_modules` string, so the same string selects the same layers.

    Raises:
        UserError: none is; the message names `purpose`.
    """
    names = {pair.name: pair.name.removeprefix("base_model.model.") for pair in pairs}
    found = [pair for pair in pairs if re.fullmatch(pattern, names[pair.name])]
    if not found:
        layers = f"LoRA is on {len(pairs)} layers, such as {names[pairs[0].name]}" if pairs else "no layer has LoRA"
        raise UserError(f"{purpose}: no LoRA layer matches {pattern!r} ({layers})")
    return found
