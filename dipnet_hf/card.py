"""The model card of a saved adapter: made from its folder alone, so that it can be written again at any time."""

import json
import math
import os
import statistics
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

_BEGIN, _END = "<!-- dipnet_hf begin -->", "<!-- dipnet_hf end -->"


def write_model_card(
    folder: str | os.PathLike, training_data: str | None = None, metrics: dict[str, float] | None = None
) -> None:
    """Write this package's section into the `README.md` of a saved adapter, and keep the rest of it.

    Args:
        folder (`str`): holds `adapter_config.json` and `adapter_model.safetensors`.
        training_data (`str`, *optional*): what it was trained on.
        metrics (`dict[str, float]`, *optional*): measured on held-out data, by name.
    """
    path = os.path.join(folder, "README.md")
    with open(os.path.join(folder, "adapter_config.json")) as file:
        config = json.load(file)
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "dipnet", "dipnet_hf"})
    if config["base_model_name_or_path"]:
        card.data["base_model"] = config["base_model_name_or_path"]

    section = f"{_BEGIN}\n{_section(folder, config, training_data, metrics)}\n{_END}"
    template = ModelCard.from_template(ModelCardData()).text.strip()
    text = card.text.replace(template, "")  # the empty template says nothing
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    card.text = "\n\n".join(part.strip() for part in (before, section, after) if part.strip())
    card.save(path)


def _section(folder, config: dict[str, Any], training_data: str | None, metrics: dict[str, float] | None) -> str:
    base = config["base_model_name_or_path"] or "the base model"
    weights = config["weights"] if isinstance(config["weights"], str) else config["weights"]["peft_type"]
    sites, layers = config["target_sites"] or config["target_modules"], config["layers_to_transform"]
    lines = [
        "# DIPNet adapter",
        "",
        f"A DIPNet ([arXiv 2506.04690](https://arxiv.org/abs/2506.04690)) of `{base}`. "
        "In training, the inputs of its layers are Gaussians whose variances were learned with the weights. "
        "`model.eval()` answers without noise.",
        "",
        "```python",
        "import dipnet_hf  # registers the adapter type with PEFT",
        "from peft import AutoPeftModelForCausalLM",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("path/or/hub-id")',
        "```",
        "",
        f"- Base model: `{base}`",
        f"- Weights: `{weights}`",
        f"- Sites: `{sites}`, layers `{'all' if layers is None else layers}`, "
        f"one variance per {config['granularity']}",
        f"- Noise: {config['noise_scale']}, initial standard deviation {config['init_noise_std']}",
        f"- Objective: {config['num_samples']} noise sample(s) per step, {_prior(config)}, "
        f"stability weight {config['stability_loss_weight']:.6g} on {config['stability_target']}",
        f"- Training data: {training_data or 'not recorded'}",
    ]
    lines += [f"- {name}: {value:.4f}" for name, value in (metrics or {}).items()]
    lines += [
        "",
        "## Learned noise",
        "",
        f"Standard deviation in units of the channel's scale ({config['noise_scale']} noise; the table has the median "
        "scale of each site's channels).",
        "",
    ]
    lines += ["| site | scale | mean | min | max |", "|---|---|---|---|---|"]
    for name, row in read_noise(folder).items():
        std, scale = row["std"], statistics.median_low(row["scale"])
        lines.append(f"| {name} | {scale:.4g} | {sum(std) / len(std):.4g} | {min(std):.4g} | {max(std):.4g} |")
    return "\n".join([*lines, "", f"Written by dipnet_hf {config['dipnet_hf_version']}."])


def _prior(config: dict[str, Any]) -> str:
    if "alpha" in config:  # of version 0.1
        return f"prior alpha {config['alpha']:.6g}, beta {config['beta']:.6g} ({config['prior_reduction']})"
    std = "the initial standard deviation" if config["prior_std"] is None else f"{config['prior_std']:.6g}"
    return f"prior of weight {config['prior_weight']:.6g} ({config['prior_reduction']}) around {std}"


def read_noise(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Read the learned noise of a saved adapter.

    Returns:
        `dict`: by site name, the lists `scale` (one value per channel) and `std` (one value per channel, or one for
        all, in units of the scale).
    """
    noise: dict[str, dict[str, Any]] = {}
    with safe_open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        for key in list(file.keys()):  # full weights lie in the same file: read only what is needed
            site, found, parameter = key.removeprefix("base_model.model.").rpartition(".dip_projection.")
            if found and parameter == "dip_logvar":
                noise.setdefault(site, {})["std"] = [math.exp(v / 2) for v in file.get_tensor(key).tolist()]
            elif found and parameter == "dip_scale":
                noise.setdefault(site, {})["scale"] = file.get_tensor(key).reshape(-1).tolist()
    return {site: noise[site] for site in sorted(noise, key=_by_layer)}


def _by_layer(site: str) -> list[int]:
    return [int(part) for part in site.split(".") if part.isdigit()]
