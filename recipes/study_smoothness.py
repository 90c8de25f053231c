"""How smooth the network of a finished run is, in three numbers: a study puts them beside its loss."""

import torch
from torch.utils.data import DataLoader

from dipnet_hf.diagnostics import layer_places, lipschitz_constants, noise_robustness, weight_robustness
from recipes.data import make_collator, prepare_data
from recipes.diagnose import trained_weights
from recipes.finished_run import load_network, read_run
from recipes.running import load_tokenizer

SETTINGS = {
    "num_tokens": 16,  # whose Lipschitz constants are measured
    "num_draws": 4,  # of the noise
    "layer_radius": 0.2,  # of the noise at the layers, relative to a layer's typical input
    "weight_radius": 0.1,  # of the noise in the weights, relative to each tensor
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

    model, batches, num_draws = load_network(run).to(device), batches_of(BATCH_SIZE), SETTINGS["num_draws"]
    constants = lipschitz_constants(model, batches_of(len(rows))[0], num_tokens=SETTINGS["num_tokens"])
    layer_radii, weight_radii = (0.0, SETTINGS["layer_radius"]), (0.0, SETTINGS["weight_radius"])
    of_layers = noise_robustness(model, batches, layer_radii, layer_places(model), num_draws)
    of_weights = weight_robustness(model, trained_weights(model), batches, weight_radii, num_draws)
    return {
        "lipschitz": float(torch.log(constants.logits).mean().exp()) * constants.token_norm,
        "layer_noise_rise": of_layers[1].nll - of_layers[0].nll,
        "weight_noise_rise": of_weights[1].nll - of_weights[0].nll,
    }
