"""What `generate` is checked for while noise is on, in front of transformers' own checks."""

from typing import Any

from torch import nn
from transformers.generation import GenerationConfig, GenerationMode

from .contexts import ContextValue
from .sampled_rows import SampledRows


class GenerationGuard:
    """Stands in a model for its check of a generation, and for its continuous batching.

    Args:
        model (`nn.Module`): the network itself; one that cannot generate stays as it is.
        current_pass (`ContextValue`): the pass of each context; checked if it is one of `SampledRows`.
        noise_on (`ContextValue`): whether noise is on in a context, None outside of all.
    """

    def __init__(self, model: nn.Module, current_pass: ContextValue[Any], noise_on: ContextValue[Any]) -> None:
        self._model: Any = model
        self._pass = current_pass
        self._noise_on = noise_on
        self._stand_ins = {"_validate_generation_mode": self._check, "generate_batch": self._generate_batch}
        self._before = {name: vars(model).get(name) for name in self._stand_ins}  # another guard's
        if hasattr(model, "_validate_generation_mode"):
            vars(model).update(self._stand_ins)

    def remove(self) -> None:
        """Give the model its own methods back."""
        for name, stand_in in self._stand_ins.items():
            if vars(self._model).get(name) == stand_in:
                del vars(self._model)[name]
                if self._before[name] is not None:
                    vars(self._model)[name] = self._before[name]

    def _check(self, mode: GenerationMode, config: GenerationConfig, mode_kwargs: dict[str, Any]) -> None:
        """Check what `generate` is about to do; it calls this by the name of its own check, which comes after."""
        if isinstance(rows := self._pass.get(), SampledRows):
            rows.check_generation(mode, config)
        self._call_before("_validate_generation_mode", mode, config, mode_kwargs)

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, but within a context."""
        if self._noise_on.get() is not None:
            raise ValueError(
                "Continuous batching runs in a thread of its own, which this context does not reach: use generate, on "
                "padded batches."
            )
        return self._call_before("generate_batch", *args, **kwargs)

    def _call_before(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call what this guard stands in for."""
        before = self._before[name]
        return (
            getattr(type(self._model), name)(self._model, *args, **kwargs)
            if before is None
            else before(*args, **kwargs)
        )
