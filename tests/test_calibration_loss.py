"""The labels by which calibration finds the level: draws from the model's own predictions without noise."""

import torch

from dipnet_hf.calibration_loss import CalibrationLoss
from tests.helpers import dip_model, predictions
from tests.tiny_models import build_with_outliers, make_outlier_batch


def test_labels_are_drawn_from_the_predictions_without_whole_logits():
    batch = make_outlier_batch(num_rows=8)
    model = dip_model(build_with_outliers(), [batch], init_noise_std=0.1)
    expected = predictions(model.eval(), batch).exp()
    model.train()
    loss = CalibrationLoss(
        model=model.get_base_model(),
        batches=[batch],
        capture=model.hidden_state_capture,
        noise=lambda on: model.sampling() if on else model.deterministic(),
        wrapped=model.get_base_model(),
    )
    shapes = []
    model.get_base_model().register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape))
    supervised, counts = batch["labels"][:, 1:] != -100, torch.zeros_like(expected)
    for seed in range(400):
        with torch.no_grad():
            drawn = loss.draw_labels(batch, seed)["labels"]
        assert torch.equal(drawn == -100, batch["labels"] == -100)
        counts[torch.arange(len(expected)), drawn[:, 1:][supervised]] += 1
    deviations = (counts / 400 - expected) / (expected * (1 - expected) / 400).sqrt().clamp(min=1 / 400)
    assert deviations.abs().max() < 5
    assert {shape[1] for shape in shapes} == {0}  # the head saw no token
