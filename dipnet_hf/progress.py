"""The Trainer's progress bar, with the figures to watch behind it."""

from transformers.trainer_callback import ProgressCallback

SHOWN = {
    "nll": "nll",
    "noise_std_mean": "noise",
    "eval_nll": "eval_nll",
    "eval_loss": "eval_loss",
    "eval_exact_match": "right",
}


class NoiseProgress(ProgressCallback):
    """transformers' progress bar, and behind it the latest NLL, the noise's mean std and what evaluations found.

    The std is the mean over all sites, in units of each site's scale.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._latest: dict[str, float] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """As transformers', which writes a line above the bar, and then the figures behind it."""
        super().on_log(args, state, control, logs, **kwargs)
        self._latest |= {label: logs[name] for name, label in SHOWN.items() if name in (logs or {})}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._latest)
