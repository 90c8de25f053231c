"""Deep ensembles: the mean of k networks that were trained apart, through the same `ensemble` calls as DIPNet's."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..architecture import network_of
from ..contexts import PerThread
from ..sampled_rows import Repeated, SampledRows, check_samples
from .samples import Answering, Combine


class DeepEnsemble(Answering):
    """The mean of k runs (Lakshminarayanan et al. 2017, arXiv 1612.01474, section 2.4), which differ in their seeds.

        members = DeepEnsemble([model, other, third])
        with members.ensemble(3):
            model.generate(**inputs)

    `num_samples` takes the first so many members; there is nothing for a seed to choose.

    Cost: k trainings; at inference k passes and the memory of k models. Runs of LoRA on one base, loaded into it as
    adapters (`model.load_adapter(folder, adapter_name=...)`), share its memory, and run as k rows for one.

    Args:
        members (`Sequence[nn.Module]` or `PeftModel`): models of one architecture, of which the first answers for all;
            or one model with LoRA adapters, in their order.

    Raises:
        ValueError: there are no two members, or the adapters are not plain LoRA.
    """

    def __init__(self, members: Sequence[nn.Module] | PeftModel) -> None:
        self._adapters: list[str] = []
        if isinstance(members, PeftModel):
            self._adapters = list(members.peft_config)
            if wrong := [name for name, config in members.peft_config.items() if type(config) is not LoraConfig]:
                raise ValueError(
                    f"The adapters of one model answer together if they are LoRA, and '{wrong[0]}' is of "
                    f"{type(members.peft_config[wrong[0]]).__name__}: give a list of models."
                )
            self._models: list[Any] = [members]
        else:
            self._models = list(members)
        self.num_members = len(self._adapters or self._models)
        if self.num_members < 2:
            raise ValueError(f"A deep ensemble needs at least 2 members, got {self.num_members}.")
        if len({id(network_of(model)) for model in self._models}) < len(self._models):
            raise ValueError("Two members of the ensemble are the same model: load each run into one of its own.")
        self.answer_from(self._models[0])
        network: nn.Module = self.network
        if self._adapters:
            self._handles += [
                module.register_forward_pre_hook(self._name_adapters, with_kwargs=True)
                for module in network.modules()
                if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper)
            ]

    def make_samples(self, num_samples: int, seed: int, combine: Combine) -> SampledRows:
        """See `Answering`."""
        check_samples(num_samples, seed)
        if num_samples > self.num_members:
            raise ValueError(f"The ensemble has {self.num_members} members, got num_samples={num_samples}.")
        if any(model.training for model in self._models):
            raise ValueError("The members of an ensemble answer in eval mode: call model.eval() on each.")
        if self._adapters:
            return SampledRows(self.network, num_samples, combine, seed)
        return _Members(self.network, self._models[1:num_samples], combine, seed)

    def _name_adapters(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Give each row the adapter of its sample, as PEFT runs batches of mixed adapters."""
        samples = self._samples.get()
        if samples is None or samples.num_rows is None:
            return None
        names = [name for name in self._adapters[: samples.num_samples] for _ in range(samples.num_rows)]
        return args, {**kwargs, "adapter_names": names}


@dataclass
class _MembersPass(PerThread):
    """What the other members need in the forward pass that a thread runs now."""

    inputs: dict[str, Any] = field(default_factory=dict)
    caches: list[Any] = field(default_factory=list)


class _Members(SampledRows):
    """Runs the other members when the first one has run; their caches travel on that of the first one."""

    def __init__(self, first: nn.Module, others: Sequence[nn.Module], combine: Combine, seed: int) -> None:
        super().__init__(first, 1, self._run_others, seed)
        self._others = others
        self._combine_all = combine
        self._pass = _MembersPass()

    def repeat(self, kwargs: dict[str, Any]) -> Repeated:
        """See `SampledRows`; no row is repeated."""
        repeated = super().repeat(kwargs)
        cache = repeated.inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() == 0:
            cache.dip_members = [copy.deepcopy(cache) for _ in self._others]
        self._pass.caches = [None] * len(self._others) if cache is None else getattr(cache, "dip_members", [])
        if len(self._pass.caches) != len(self._others):
            raise ValueError("past_key_values was not filled within this ensemble: use a cache of its own.")
        self._pass.inputs = {**repeated.inputs, "return_dict": True}
        return repeated

    def _run_others(self, logits_1BLV: torch.Tensor) -> torch.Tensor:
        caches = [{} if cache is None else {"past_key_values": cache} for cache in self._pass.caches]
        pairs = zip(self._others, caches, strict=True)
        outputs = [other(**{**self._pass.inputs, **cache}) for other, cache in pairs]
        self._pass.caches = [getattr(output, "past_key_values", None) for output in outputs]
        return self._combine_all(torch.cat([logits_1BLV, *(output.logits[None] for output in outputs)]))

    def end(self, output: Any) -> Any:
        """See `SampledRows`."""
        result = super().end(output)
        if (cache := getattr(result, "past_key_values", None)) is not None:
            cache.dip_members = self._pass.caches
        self._pass.inputs, self._pass.caches = {}, []
        return result
