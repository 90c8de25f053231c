"""DipConfig: the adapter's fields and their validation, no logic."""

import dataclasses
import difflib
import math
import os
import warnings
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType
from peft.config import PromptLearningConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .card import write_model_card

TARGET_SITES = ("decoder_layer", "attention", "mlp", "linear", "embedding")
PRIOR_WEIGHT = 0.1


@dataclass
class DipConfig(PeftConfig):
    """Configuration of a Distributional Input Projection Network (arXiv 2506.04690) around any PEFT method.

    Args:
        weights (`PeftConfig` or `str`): how the network's own weights learn: any injectable PEFT config (LoRA, DoRA,
            IA3, OFT, ...), by default LoRA of rank 16 on all linear layers; `"full"` (all of them) or `"frozen"` (only
            the variances learn). A `task_type`, of it or of this config, adds the task's new head as in PEFT.
        target_sites (`str`, *optional*): whose inputs are projected: `"decoder_layer"` (the default), `"attention"`,
            `"mlp"`, `"linear"` (every linear layer within the decoder layers), or `"embedding"` (its output: the
            randomized smoothing of the paper's RS baseline).
        target_modules (`list[str]` or `str`, *optional*): instead of `target_sites`, module names or a regex, as in
            PEFT.
        layers_to_transform (`int` or `list[int]`, *optional*): only these layers, as in PEFT.
        layers_pattern (`str` or `list[str]`, *optional*): the layers' name for `layers_to_transform` with
            `target_modules`, as in PEFT.
        granularity (`str`): one variance per `"channel"` (the paper's diagonal Sigma), or one per `"layer"`.
        noise_scale (`str`): `"relative"` to the spread of each channel of a site's input, which `calibrate` measures,
            or `"absolute"`, the paper's form.
        init_noise_std (`float` or `str`): the noise's initial standard deviation, in units of the scale; or `"auto"`:
            `calibrate` finds the one that costs `init_loss_increase`.
        init_loss_increase (`float`): how much `"auto"` noise raises the loss of calibration's batches, in nats per
            supervised token, were the model's own predictions right: how far noise takes them from where they were.
        logvar_learning_rate (`float`): the learning rate of the log-variances in the trainers' own optimizer, which
            never decays them; 0 keeps them as they are.
        num_samples (`int`): S of eq. (2), noise samples per row in a training step.
        sampling (`str`, *optional*): the samples come in `"pairs"` of +eps and -eps, the default where S is even, or
            are `"independent"`.
        prior_std (`float`, *optional*): the standard deviation of the prior of eq. (3), in units of the scale; by
            default the one at which the variances began. They settle below it.
        prior_weight (`float`): eq. (3) is this weight, in nats per token, times the KL divergence of the noise from
            the prior, up to a constant. Where the loss rises in proportion to the variances, noise costs less than
            half of it at the optimum (with the `"mean"` reduction).
        prior_reduction (`str`): eq. (3) as the `"mean"` over all sites and channels, or the `"sum"` of the paper.
        stability_loss_weight (`float`): weight of eq. (4); needs `num_samples >= 2`.
        stability_target (`str`): f of eq. (4): the target's `"log_prob"`, or the `"logits"`.
        dipnet_hf_version (`str`, *optional*): the version that wrote the file; set automatically.
        alpha, beta (`float`, *optional*): the paper's weights of the variance and of the log-variance in eq. (3), in
            place of `prior_std = sqrt(beta / alpha)` and `prior_weight = 2 * beta`, as which they are kept.
        antithetic, shared_prompt_noise (`bool`, *optional*): from files that an earlier version wrote. The first is
            `sampling="pairs"` now; the second concerned training alone and is gone.

    Raises:
        ValueError: a value out of range, or fields that contradict each other; the message names what is allowed.
        TypeError: `weights` is neither a PEFT config nor one of the two words.
    """

    weights: PeftConfig | dict | str = field(
        default_factory=lambda: LoraConfig(r=16, target_modules="all-linear"),
        metadata={"help": "PEFT config, 'full' or 'frozen'."},
    )
    target_sites: str | None = field(default=None, metadata={"help": f"One of {TARGET_SITES}."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Module names or a regex."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "The layers' name."})
    granularity: str = field(default="channel", metadata={"help": "'channel' or 'layer'."})
    noise_scale: str = field(default="relative", metadata={"help": "'relative' or 'absolute'."})
    init_noise_std: float | str = field(default="auto", metadata={"help": "Initial noise std, or 'auto'."})
    init_loss_increase: float = field(default=0.02, metadata={"help": "Nats per token that 'auto' noise costs."})
    logvar_learning_rate: float = field(default=2e-2, metadata={"help": "Learning rate of the log-variances."})
    num_samples: int = field(default=1, metadata={"help": "Noise samples per row."})
    sampling: str | None = field(default=None, metadata={"help": "'pairs' or 'independent'."})
    prior_std: float | None = field(default=None, metadata={"help": "Std of the prior; None: init_noise_std."})
    prior_weight: float = field(default=PRIOR_WEIGHT, metadata={"help": "Weight of the KL divergence, eq. (3)."})
    prior_reduction: str = field(default="mean", metadata={"help": "'mean' or 'sum'."})
    stability_loss_weight: float = field(default=0.0, metadata={"help": "Weight of eq. (4)."})
    stability_target: str = field(default="log_prob", metadata={"help": "'log_prob' or 'logits'."})
    dipnet_hf_version: str | None = field(default=None, metadata={"help": "The version that wrote the file."})
    alpha: InitVar[float | None] = None
    beta: InitVar[float | None] = None
    antithetic: InitVar[bool | None] = None
    shared_prompt_noise: InitVar[bool | None] = None

    def __post_init__(
        self,
        alpha: float | None,
        beta: float | None,
        antithetic: bool | None,
        shared_prompt_noise: bool | None,
    ) -> None:
        super().__post_init__()
        self.peft_type = "DIP"
        if self.dipnet_hf_version is None:
            from . import __version__

            self.dipnet_hf_version = __version__
        self._check_weights()
        self._check_targets()
        self._check_noise()
        self._take_paper_prior(alpha, beta)
        self._check_prior()
        self._take_old_sampling(antithetic, shared_prompt_noise)
        self._check_samples()

    def _check_weights(self) -> None:
        if isinstance(self.weights, dict):
            peft_types = tuple(peft_type.value for peft_type in PeftType)
            _check_choice("peft_type of the weights", self.weights.get("peft_type"), peft_types)
            self.weights = PeftConfig.from_peft_type(**self.weights)
        if isinstance(self.weights, str):
            _check_choice("weights", self.weights, ("full", "frozen"), also="a PEFT config such as LoraConfig(...)")
        elif not isinstance(self.weights, PeftConfig):
            raise TypeError(f'weights must be a PEFT config, "full" or "frozen", got {type(self.weights).__name__}.')
        elif isinstance(self.weights, (PromptLearningConfig, DipConfig)) or self.weights.is_adaption_prompt:
            raise ValueError(
                f"weights must be a PEFT method that is injected into layers (LoRA, IA3, OFT, ...), "
                f"got {type(self.weights).__name__}."
            )
        else:
            self._take_task_type(self.weights.task_type)

    def _take_task_type(self, task_type: str | None) -> None:
        if task_type is None:
            return
        if self.task_type not in (None, task_type):
            raise ValueError(
                f"task_type={self.task_type!r} contradicts task_type={task_type!r} of the weights: give it once."
            )
        self.task_type = task_type

    def _check_targets(self) -> None:
        if self.target_sites is None and self.target_modules is None:
            self.target_sites = "decoder_layer"
        if self.target_sites is not None and self.target_modules is not None:
            raise ValueError(
                f"Give target_sites or target_modules, got both: {self.target_sites!r} and {self.target_modules!r}."
            )
        if self.target_sites is not None:
            _check_choice("target_sites", self.target_sites, TARGET_SITES, also="target_modules with module names")
        if self.target_sites == "embedding" and self.layers_to_transform is not None:
            raise ValueError('layers_to_transform has no meaning with target_sites="embedding": leave it out.')
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list: put the layers into the regex.")
        if self.layers_pattern is not None and (self.target_modules is None or self.layers_to_transform is None):
            raise ValueError("layers_pattern needs target_modules and layers_to_transform.")
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)

    def _check_noise(self) -> None:
        _check_choice("granularity", self.granularity, ("channel", "layer"))
        _check_choice("noise_scale", self.noise_scale, ("relative", "absolute"))
        if isinstance(self.init_noise_std, str):
            _check_choice("init_noise_std", self.init_noise_std, ("auto",), also="a number")
        else:
            _check_not_negative("init_noise_std", self.init_noise_std)
        _check_not_negative("init_loss_increase", self.init_loss_increase)
        if self.init_loss_increase == 0:
            raise ValueError("init_loss_increase must be positive: noise that costs nothing is no noise. Give nats.")
        _check_not_negative("logvar_learning_rate", self.logvar_learning_rate)

    def _take_paper_prior(self, alpha: float | None, beta: float | None) -> None:
        if alpha is None and beta is None:
            return
        if alpha is None or beta is None:
            raise ValueError(f"Give both alpha and beta or neither, got alpha={alpha} and beta={beta}.")
        if self.prior_std is not None or self.prior_weight != PRIOR_WEIGHT:
            raise ValueError("Give alpha and beta, or prior_std and prior_weight, not both: they say the same.")
        _check_not_negative("alpha", alpha)
        _check_not_negative("beta", beta)
        if alpha > 0 and beta == 0:
            raise ValueError(
                f"alpha={alpha} with beta=0 makes the variances collapse to zero. Give a positive beta, or prior_std "
                "and prior_weight."
            )
        self.prior_weight = 2 * beta
        if beta > 0:  # without alpha nothing holds the variances down: a prior of infinite variance
            self.prior_std = math.sqrt(beta / alpha) if alpha > 0 else math.inf

    def _check_prior(self) -> None:
        _check_choice("prior_reduction", self.prior_reduction, ("mean", "sum"))
        _check_not_negative("prior_weight", self.prior_weight)
        if self.prior_std is None:
            return
        if isinstance(self.prior_std, bool) or not isinstance(self.prior_std, (int, float)) or not self.prior_std > 0:
            raise ValueError(f"prior_std must be a positive number, or None, got {self.prior_std!r}.")
        if self.init_noise_std == 0 and self.prior_weight > 0:
            raise ValueError(
                "init_noise_std=0 makes the prior infinite: set prior_weight=0, leave prior_std out, or give a "
                "positive std."
            )

    def _check_samples(self) -> None:
        _check_choice("stability_target", self.stability_target, ("log_prob", "logits"))
        _check_not_negative("stability_loss_weight", self.stability_loss_weight)
        if isinstance(self.num_samples, bool) or not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ValueError(f"num_samples must be an integer of at least 1, got {self.num_samples!r}.")
        if self.stability_loss_weight > 0 and self.num_samples == 1:
            raise ValueError(
                f"stability_loss_weight={self.stability_loss_weight} needs num_samples >= 2: one has no variance."
            )
        if self.sampling is not None:
            _check_choice("sampling", self.sampling, ("pairs", "independent"))
        if self.sampling == "pairs" and self.num_samples > 1 and self.num_samples % 2:
            raise ValueError(
                f'sampling="pairs" needs an even num_samples, got {self.num_samples}. Change it, or set '
                'sampling="independent".'
            )

    def _take_old_sampling(self, antithetic: bool | None, shared_prompt_noise: bool | None) -> None:
        if shared_prompt_noise:
            warnings.warn("shared_prompt_noise is gone and has no effect: samples share no noise.", stacklevel=4)
        if antithetic is None:
            return
        if self.sampling is not None:
            raise ValueError("Give sampling or antithetic, not both: they say the same.")
        self.sampling = "pairs" if antithetic else "independent"

    @property
    def uses_pairs(self) -> bool:
        """Whether the samples come in pairs of +eps and -eps."""
        return self.sampling == "pairs" or (self.sampling is None and self.num_samples % 2 == 0)

    @property
    def modules_to_save(self) -> list[str] | None:
        """The modules that PEFT trains and saves whole beside the weights' adapter; it adds a task's new head."""
        # All weights are trained and saved, or none is, and PEFT's classes of tasks insist on a name.
        return ["no module"] if isinstance(self.weights, str) else getattr(self.weights, "modules_to_save", None)

    @modules_to_save.setter
    def modules_to_save(self, names: list[str]) -> None:
        self.weights.modules_to_save = names  # type: ignore[union-attr]

    @property
    def calibration_key(self) -> list[Any]:
        """What calibration's result depends on: two adapters with one key get the same noise on one model."""
        sites = ["target_sites", "target_modules", "layers_to_transform", "layers_pattern"]
        return [getattr(self, name) for name in (*sites, "noise_scale", "init_noise_std", "init_loss_increase")]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; the config of the weights is nested."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(self.weights, PeftConfig):
            fields["weights"] = {
                name: sorted(value) if isinstance(value, set) else value
                for name, value in self.weights.to_dict().items()
            }
        return fields

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write `adapter_config.json` and bring the folder's model card up to date."""
        super().save_pretrained(save_directory, **kwargs)
        self.update_model_card(save_directory)

    def update_model_card(self, save_directory: str) -> None:
        """Bring the model card of a saved adapter up to date; a folder without its weights has none."""
        if os.path.exists(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)):
            write_model_card(save_directory)


def _check_choice(name: str, value: Any, allowed: tuple[str, ...], also: str | None = None) -> None:
    if value in allowed:
        return
    nearest = difflib.get_close_matches(str(value), allowed, n=1)
    raise ValueError(
        f"{name} must be one of {list(allowed)}{f' or {also}' if also else ''}, got {value!r}."
        + (f" Did you mean {nearest[0]!r}?" if nearest else "")
    )


def _check_not_negative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")
