"""Do two checkouts compute the same numbers, to the bit? A change of the code's form alone must not alter any.

    python benchmarks/same_numbers.py OTHER_CHECKOUT

Losses, gradients (recomputed ones too), seeded draws, ensembles and generated text of seven architectures under five
configs, from one process per checkout. If numbers differ, it prints their names and exits with status 1.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": {"n_positions": 64},
    "gpt_neox": {"intermediate_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma3_text": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "bloom": {},
    "mixtral": {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "output_router_logits": True,
    },
}
LORA = {"weights": "lora"}
CONFIGS: dict[str, dict[str, Any]] = {
    "one sample": {**LORA, "init_noise_std": "auto"},
    "pairs": {"weights": "full", "init_noise_std": 0.1, "num_samples": 2},
    "independent": {
        **LORA,
        "init_noise_std": 0.1,
        "num_samples": 3,
        "sampling": "independent",
        "stability_loss_weight": 0.1,
        "stability_target": "logits",
    },
    "linear layers": {"weights": "full", "init_noise_std": 0.1, "target_sites": "linear"},
    "upper layers": {
        **LORA,
        "init_noise_std": 0.1,
        "num_samples": 2,
        "layers_to_transform": [2],
        "stability_loss_weight": 0.1,
    },
}


def dip_config(fields: dict[str, Any]) -> Any:
    """Make the checkout's config from today's field names."""
    from dipnet_hf import DipConfig

    fields = dict(fields)
    if fields["weights"] == "lora":
        fields["weights"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    if "sampling" not in DipConfig.__dataclass_fields__:  # before version 0.3
        fields["antithetic"] = fields.pop("sampling", "pairs") == "pairs"
    return DipConfig(**fields)


def build(architecture: str) -> PreTrainedModel:
    """A tiny model whose random weights are so large that its predictions are confident and noise changes them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **_SIZES, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def digest(*tensors: torch.Tensor) -> str:
    """A fingerprint of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """The gradients of all parameters that have one."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def numbers(architecture: str, fields: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of everything that one architecture computes under one config."""
    from dipnet_hf import dip_loss, get_dip_model

    ids = torch.arange(24).view(2, 12) * 7 % 61 + 2
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    base = build(architecture)
    torch.manual_seed(1)
    model = get_dip_model(base, dip_config(fields), calibration=[batch] * 4)
    found = {"calibration": digest(*(value for name, value in model.state_dict().items() if "dip_" in name))}
    model.train()
    torch.manual_seed(2)
    for step in range(2):
        loss = dip_loss(model, batch)
        loss.loss.backward()
        found[f"loss {step}"] = digest(*loss)
    found["gradients"] = digest(*gradients(model))
    model.zero_grad()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    dip_loss(model, batch).loss.backward()
    found["recomputed gradients"] = digest(*gradients(model))
    model.zero_grad()
    with model.ensemble(num_samples=2, seed=5):
        model(**batch, use_cache=False).loss.backward()
    found["recomputed gradients of an ensemble"] = digest(*gradients(model))
    base.gradient_checkpointing_disable()
    model.eval()
    with torch.no_grad():
        found["noise-free logits"] = digest(model(input_ids=ids).logits)
        with model.sampling(seed=3):
            found["seeded logits"] = digest(model(input_ids=ids).logits, model(input_ids=ids).logits)
        with model.ensemble(num_samples=3, seed=4):
            found["ensemble logits"] = digest(model(**batch).logits)
            found["ensemble text"] = digest(model.generate(**prompt, max_new_tokens=4, do_sample=False))
    return found


def write_numbers() -> None:
    """Print the fingerprints of the checkout that the process runs in."""
    torch.set_num_threads(1)
    table = {}
    for architecture in ARCHITECTURES:
        for name, fields in CONFIGS.items():
            for what, value in numbers(architecture, fields).items():
                table[f"{architecture}, {name}, {what}"] = value
    print(json.dumps(table))


def numbers_of(checkout: Path) -> dict[str, str]:
    """Run this script in another process on `checkout`'s package."""
    child = subprocess.run(
        [sys.executable, __file__, "--write"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """Compare two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="the folder of another checkout")
    parser.add_argument("--write", action="store_true", help="print this checkout's numbers and stop")
    arguments = parser.parse_args()
    if arguments.write:
        write_numbers()
        return
    if arguments.other is None or not (arguments.other / "dipnet_hf").is_dir():
        parser.error(f"Give the folder of another checkout, which holds dipnet_hf/; got {arguments.other}.")
    here, there = numbers_of(Path(__file__).parents[1]), numbers_of(arguments.other.resolve())
    names = here.keys() | there.keys()
    different = sorted(name for name in names if here.get(name) != there.get(name))
    print(f"{len(names) - len(different)} of {len(names)} numbers are the same to the bit.")
    print("\n".join(f"  differs: {name}" for name in different))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
