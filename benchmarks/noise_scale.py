"""Which scale of the noise fits a real model: the loss at several levels before training, and the loss after it.

    python benchmarks/noise_scale.py recipes/configs/smollm2-svamp.yaml              # the table, before any training
    python benchmarks/noise_scale.py recipes/configs/smollm2-svamp.yaml --train 4    # and four epochs at each scale

Writes `results/noise_scale-<model>-cpu.json`, each row as soon as it is measured; if started again, it continues. Each
candidate replaces the scale that calibration measured, and is computed from the same tokens. Training is that of
`recipes/finetune.py`, on the first 200 problems; its NLL is that of the last 100 problems of the training data. It
starts at the level that costs `init_loss_increase`, so that scales are compared at an equal price.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, set_seed

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import RESULTS
from dipnet_hf import get_dip_model
from dipnet_hf.scale import ScaleMeter, channel_scale
from recipes import finetune
from recipes.config import FinetuneConfig, load_config
from recipes.data import make_collator, prepare_data
from recipes.running import load_tokenizer, model_dtype
from report import provenance

NUM_CALIBRATION_BATCHES = 8
NUM_TRAIN, NUM_VALIDATION = 200, 100
STDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


def site_rms(x_ND: torch.Tensor, update_ND: torch.Tensor) -> torch.Tensor:
    """The first design: one RMS for all channels."""
    return x_ND.square().mean().sqrt().expand(x_ND.shape[1])


def channel_rms(x_ND: torch.Tensor, update_ND: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the channel, which a massive token dominates."""
    return x_ND.std(0)


def median_deviation(x_ND: torch.Tensor, update_ND: torch.Tensor) -> torch.Tensor:
    """What calibration takes: 1.4826 times the median absolute deviation."""
    return channel_scale(x_ND)


def interquartile_range(x_ND: torch.Tensor, update_ND: torch.Tensor) -> torch.Tensor:
    """The interquartile range over that of a standard normal."""
    low, high = (x_ND.kthvalue(max(1, int(len(x_ND) * part)), dim=0).values for part in (0.25, 0.75))
    return (high - low) / 1.349


def clipped_rms(x_ND: torch.Tensor, update_ND: torch.Tensor) -> torch.Tensor:
    """The RMS of the distance from the median, clipped at its 0.9 quantile."""
    deviation_ND = (x_ND - x_ND.median(0).values).abs()
    limit_D = deviation_ND.kthvalue(int(len(x_ND) * 0.9), dim=0).values
    return deviation_ND.minimum(limit_D).square().mean(0).sqrt() / 0.9117  # that of a standard normal


def update_deviation(x_ND: torch.Tensor, update_ND: torch.Tensor) -> torch.Tensor:
    """The median absolute deviation of what the layer adds to the residual stream."""
    return channel_scale(update_ND)


CANDIDATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    scale.__name__: scale
    for scale in (site_rms, channel_rms, median_deviation, interquartile_range, clipped_rms, update_deviation)
}


def main(arguments: list[str] | None = None) -> None:
    """Measure every row that the result file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of recipes/finetune.py")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as finetune.py's")
    parser.add_argument("--train", type=int, metavar="EPOCHS", help="train at each scale too")
    parser.add_argument("--scales", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="which candidates")
    args = parser.parse_args(arguments)

    sizes = [f"max_train_samples={NUM_TRAIN}", f"num_validation_samples={NUM_VALIDATION}", "max_eval_samples=1"]
    config = load_config(str(args.config), [*sizes, *args.set])
    results = Results(RESULTS / f"noise_scale-{Path(config.model).name}-cpu.json", config)
    scales = measure_table(config, args.scales, results)
    if args.train is not None:
        overrides = [*sizes, *args.set, f"training.num_train_epochs={args.train}"]
        for name in ("noise off", *args.scales):
            case = {"scale": name, "epochs": args.train, "seed": config.training["seed"]}
            results.add(case, lambda case=case, name=name: train(args.config, overrides, case, scales.get(name)))


def measure_table(config: FinetuneConfig, names: list[str], results: "Results") -> dict[str, list[torch.Tensor]]:
    """Measure the loss before training at every scale and level, and return the scales."""
    model, batches = calibrated_model(config)
    scales = candidate_scales(model, batches)
    level = model.init_noise_std
    results.add({"scale": "noise off", "std": 0.0}, lambda: {"loss": noisy_loss(model, batches, 0.0)})
    results.add({"scale": "default"}, lambda: {"std": level, "loss": noisy_loss(model, batches, level)})
    for name in names:
        for projection, scale in zip(model.base_model._projections, scales[name], strict=True):
            projection.set_noise(scale=scale)
        for std in STDS:
            results.add({"scale": name, "std": std}, lambda std=std: {"loss": noisy_loss(model, batches, std)})
    return scales


class Results:
    """A result file that grows row by row.

    Args:
        path (`Path`): the file, which may hold rows of an earlier start.
        config (`FinetuneConfig`): for its provenance.
    """

    def __init__(self, path: Path, config: FinetuneConfig) -> None:
        self._path = path
        self._provenance = provenance(__file__, asdict(config), seed=config.training_arguments().seed)
        self._commit = (self._provenance["git"] or {}).get("commit")
        self._rows = []
        if path.exists():
            earlier = json.loads(path.read_text())
            if earlier["provenance"]["config"] != self._provenance["config"]:
                raise ValueError(f"{path} is of another configuration: move it, or give the same --set.")
            self._provenance, self._rows = earlier["provenance"], earlier["rows"]

    def add(self, case: dict, measure: Callable[[], dict]) -> None:
        """Measure a case and write its row, unless the file has one."""
        if any(case.items() <= row.items() for row in self._rows):
            return
        self._rows.append({**case, **measure(), "commit": self._commit})
        print(self._rows[-1], flush=True)
        self._path.write_text(json.dumps({"provenance": self._provenance, "rows": self._rows}, indent=1) + "\n")


def calibrated_model(config: FinetuneConfig):
    """The configured model with DIPNet at its defaults, and the batches that it was calibrated on."""
    set_seed(config.training_arguments().seed)
    tokenizer = load_tokenizer(config)
    rows = prepare_data(config, tokenizer).train
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=model_dtype(config))
    loader = DataLoader(rows, config.training_arguments().train_batch_size, collate_fn=make_collator(tokenizer))
    batches = list(islice(loader, NUM_CALIBRATION_BATCHES))
    return get_dip_model(base, config.dip_config(), calibration=batches).eval(), batches


@torch.no_grad()
def candidate_scales(model, batches: list[dict]) -> dict[str, list[torch.Tensor]]:
    """Every candidate's scale at every site, from all tokens of the batches without padding."""
    layers = [model.get_base_model().get_submodule(row["name"]) for row in model.noise_summary()]
    entered, left = [[] for _ in layers], [[] for _ in layers]
    hooks = []
    for number, layer in enumerate(layers):

        def keep(module, args, kwargs, output, number=number):
            x = args[0] if args else kwargs["hidden_states"]
            # `mask` is that of the batch that runs now, see below.
            entered[number].append(x[mask].float())
            left[number].append((output[0] if isinstance(output, tuple) else output)[mask].float())

        hooks.append(layer.register_forward_hook(keep, with_kwargs=True))
    for batch in batches:
        mask = batch["attention_mask"].bool()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    sites = [(torch.cat(x), torch.cat(out)) for x, out in zip(entered, left, strict=True)]
    return {name: [scale(x, out - x) for x, out in sites] for name, scale in CANDIDATES.items()}


def noisy_loss(model, batches: list[dict], std: float) -> float:
    """The loss of the batches with noise at all sites, or without noise if the std is 0."""
    rows = model.noise_sweep(batches, [std] if std else [], per_site=False)
    return rows[-1]["loss"]


def train(config: Path, overrides: list[str], case: dict, scales: list[torch.Tensor] | None) -> dict:
    """Fine-tune at a candidate's scale, or without noise; return the initial level and the NLL after each epoch."""
    name = "-".join(str(value).replace(" ", "_") for value in case.values())
    folder = Path("runs") / "noise_scale" / Path(load_config(str(config), overrides).model).name / name
    evaluation = ["training.eval_strategy=epoch", "evaluation.tasks=[]", "evaluation.num_samples=null"]
    overrides = [*overrides, *evaluation, f"training.output_dir={folder}", *(["dip=null"] if scales is None else [])]
    if not (folder / "results.json").exists():
        # The recipe's calibration then takes this scale, and finds the level for it.
        with mock.patch.object(ScaleMeter, "scales", lambda self: scales):
            finetune.main([str(config), "--set", *overrides])
    results = json.loads((folder / "results.json").read_text())
    curve = [entry["eval_nll"] for entry in results["log_history"] if "eval_nll" in entry]
    return {"level": results["metrics"].get("init_noise_std"), "nll_by_epoch": curve[: case["epochs"]]}


if __name__ == "__main__":
    main()
