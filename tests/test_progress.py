"""The progress bar: the figures behind it, and that it takes no other bar's place."""

from functools import partial

from transformers import PrinterCallback, ProgressCallback

from dipnet_hf import DipTrainer
from dipnet_hf.progress import NoiseProgress
from tests.helpers import dip_model, make_rows, make_trainer


class OwnProgress(ProgressCallback):
    """A bar that a user has made."""


def bars(tmp_path, tqdm_is_off=False, **arguments):
    """The kinds of a trainer's callbacks that show its progress."""
    trainer_class = partial(DipTrainer, **arguments)
    trainer = make_trainer(dip_model(), make_rows(), tmp_path, trainer_class, disable_tqdm=tqdm_is_off)
    kinds = (ProgressCallback, PrinterCallback)
    return [type(callback) for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]


def test_the_bar_takes_the_place_of_transformers_own_alone(tmp_path):
    assert bars(tmp_path) == [NoiseProgress]
    assert bars(tmp_path, callbacks=[OwnProgress()]) == [OwnProgress, NoiseProgress]
    assert bars(tmp_path, tqdm_is_off=True) == [PrinterCallback]


def test_nll_and_noise_are_behind_the_bar(tmp_path, capsys):
    trainer = make_trainer(
        *(dip_model(), make_rows(), tmp_path), disable_tqdm=False, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    shown = capsys.readouterr().err
    first, last = (entry for entry in trainer.state.log_history if "nll" in entry)
    assert f"nll={first['nll']:.3g}, noise=" in shown
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert f"nll={last['nll']:.3g}, noise={last['noise_std_mean']:.3g}, eval_loss={evaluated[0]:.3g}" in shown
