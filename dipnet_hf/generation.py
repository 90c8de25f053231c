"""What `generate` is checked for while noise is on, in front of transformers' own checks."""

from typing import Any

from torch import nn
from transformers.generation import GenerationConfig, GenerationMode

from .contexts import ContextValue
from .ensemble import Ensemble
from .passes import Pass


class GenerationGuard:
    """Stands in a model for its check of a generation, and for its continuous batching.

    Args:
        model (`nn.Module`): the network itself; one that cannot generate stays as it is.
        current_pass (`ContextValue`): the pass of each context.
        noise_on (`ContextValue`): whether noise is on in a context, None outside of all.
    """

    def __init__(
        self, model: nn.Module, current_pass: ContextValue[Pass], noise_on: ContextValue[bool | None]
    ) -> None:
        self._model: Any = model
        self._pass = current_pass
        self._noise_on = noise_on
        self._stand_ins = {"_validate_generation_mode": self._check, "generate_batch": self._generate_batch}
        if hasattr(model, "_validate_generation_mode"):
            vars(model).update(self._stand_ins)

    def remove(self) -> None:
        """Give the model its own methods back."""
        for name, stand_in in self._stand_ins.items():
            if vars(self._model).get(name) == stand_in:
                del vars(self._model)[name]

    def _check(self, mode: GenerationMode, config: GenerationConfig, mode_kwargs: dict[str, Any]) -> None:
        """Check what `generate` is about to do; it calls this by the name of its own check, which comes after."""
        if isinstance(ensemble := self._pass.get(), Ensemble):
            ensemble.check_generation(mode, config)
        type(self._model)._validate_generation_mode(self._model, mode, config, mode_kwargs)

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, but within a context."""
        if self._noise_on.get() is not None:
            raise ValueError(
                "Continuous batching runs in a thread of its own, which this context does not reach: use generate, on "
                "padded batches."
            )
        return type(self._model).generate_batch(self._model, *args, **kwargs)
