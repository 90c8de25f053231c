"""How smooth the network of a finished run is, in three numbers: a study puts them beside its loss."""

import torch
from torch.utils.data import DataLoader

from dipnet_hf.diagnostics import layer_places, lipschitz_constants, noise_robustness, weight_robustness
from recipes.data import make_collator, prepare_data
from recipes.diagnose import trained_weights
from recipes.finished_run import load_network, read_run
from recipes.running import load_tokenizer

NUM_TOKENS = 16  # whose Lipschitz constants are measured
NUM_DRAWS = 4  # of the noise
LAYER_RADIUS, WEIGHT_RADIUS = 0.2, 0.1  # of the noise, relative to a layer's typical input and to each tensor
SETTINGS = {
    "num_tokens": NUM_TOKENS,
    "num_draws": NUM_DRAWS,
    "layer_radius": LAYER_RADIUS,
    "weight_radius": WEIGHT_RADIUS,
}
BATCH_SIZE = 8


def measure_smoothness(folder: str, num_problems: int) -> dict[str, float]:
    """Measure a run's network, as it answers in one pass without noise, on its first held-out problems.

    Args:
        folder (`str`): of a finished run of recipes/finetune.py or recipes/distill.py.
        num_problems (`int`): how many problems.

    Returns:
        `dict`: `lipschitz`, the geometric mean over tokens of the logits' local Lipschitz constant at the embeddings,
        times the norm of a typical token; `layer_noise_rise` and `weight_noise_rise`, by how many nats per token the
        NLL rises under noise at every layer's input and in all weights that were trained.
    """
    run = read_run(folder)
    tokenizer = load_tokenizer(run.config)
    heldout = prepare_data(run.config, tokenizer).heldout
    assert heldout is not None  # a study's runs hold problems out
    rows = heldout.select(range(min(num_problems, len(heldout))))
    device = run.config.training_arguments().device

    def batches_of(size: int) -> list[dict[str, torch.Tensor]]:
        loader = DataLoader(rows, size, collate_fn=make_collator(tokenizer))
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in loader]

    model, batches = load_network(run).to(device), batches_of(BATCH_SIZE)
    constants = lipschitz_constants(model, batches_of(len(rows))[0], num_tokens=NUM_TOKENS)
    of_layers = noise_robustness(model, batches, (0.0, LAYER_RADIUS), layer_places(model), NUM_DRAWS)
    of_weights = weight_robustness(model, trained_weights(model), batches, (0.0, WEIGHT_RADIUS), NUM_DRAWS)
    return {
        "lipschitz": float(torch.log(constants.logits).mean().exp()) * constants.token_norm,
        "layer_noise_rise": of_layers[1].nll - of_layers[0].nll,
        "weight_noise_rise": of_weights[1].nll - of_weights[0].nll,
    }
