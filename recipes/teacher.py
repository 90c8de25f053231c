"""The teacher of a distillation: a finished run's network, and what lets it answer with the mean of its samples.

Samples are passes with DIPNet's noise, or networks of a regularizer that has some, such as MC dropout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dipnet_hf.noise import KeySource
from dipnet_hf.regularizers.samples import SampledRegularizer
from dipnet_hf.regularizers.saved import attach_saved
from recipes.config import FinetuneConfig, load_config
from recipes.running import load_dip_run, load_plain_run


class Teacher(NamedTuple):
    """A network in eval mode, which answers without noise, and what has its samples: a `DipModel` itself, or a method.

    Both kinds of samples have `ensemble` and `ensemble_samples`.
    """

    network: Any
    samples: Any

    @contextmanager
    def noisy(self) -> Iterator[None]:
        """Context of one pass with noise of its own, drawn from PyTorch's global generator and the process's rank."""
        if isinstance(self.samples, SampledRegularizer):
            (key,) = KeySource().next(num_sites=1)
            with self.samples.ensemble(1, seed=int(key)):
                yield
        else:
            with self.network.sampling():
                yield


def load_teacher_config(folder: str) -> FinetuneConfig:
    """Read the configuration of the teacher's run.

    Raises:
        ValueError: there is no finished run with samples, or its own weights cannot learn.
    """
    if not (Path(folder) / "results.json").is_file():
        raise ValueError(
            f"{folder} holds no finished run of recipes/finetune.py: run it first, or set teacher=FOLDER."
        )
    run = load_config(str(Path(folder) / "config.yaml"))
    method = run.make_regularizer()
    if method is not None and method.changes_network:
        raise ValueError(f"{folder} trained with {type(method).__name__}, which a plain student cannot hold.")
    if run.dip is None and not isinstance(method, SampledRegularizer):
        raise ValueError(
            f"{folder} holds a run without noise to average over: fine-tune with `dip`, or with a `regularizer` that "
            "has samples."
        )
    if run.weights == "frozen":
        raise ValueError(f"{folder} trained with weights: frozen, so no weights could learn from the ensemble.")
    return run


def load_teacher(folder: str, run: FinetuneConfig, device: torch.device | str = "cpu") -> Teacher:
    """Load the network of a finished run with what it had trained, and its samples."""
    network: Any = load_plain_run(folder, run) if run.dip is None else load_dip_run(folder, run)
    network.to(device).eval()
    return Teacher(network, attach_saved(network, folder) if run.dip is None else network)
