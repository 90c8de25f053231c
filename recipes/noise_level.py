"""Draw the loss against the level of the noise, at each site alone and at all of them, before any training.

    python recipes/noise_level.py recipes/configs/smollm2-svamp.yaml --output runs/noise-level

The model, data, adapter and noise are those of a configuration of `recipes/finetune.py` with `dip`. The batches are
the first ones of its training data. Writes `noise-level.png` and `noise-level.json`.
"""

import argparse
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import set_seed

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dipnet_hf import get_dip_model
from recipes.config import load_config
from recipes.data import make_collator, prepare_data
from recipes.running import load_base, load_tokenizer, write_results
from report import plot_noise_level, provenance

STDS = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)


def main(arguments: list[str] | None = None) -> None:
    """Calibrate one configuration's model, sweep the level, and draw the losses."""
    args = parse_arguments(arguments)
    config = load_config(args.config, args.set)
    dip = config.dip_config()
    if dip is None:
        raise ValueError(f"{args.config} has dip: null, and a plain model has no noise: remove that.")
    set_seed(config.training_arguments().seed)
    tokenizer = load_tokenizer(config)
    rows = prepare_data(config, tokenizer).train
    batch_size = config.training_arguments().train_batch_size
    batches = list(islice(DataLoader(rows, batch_size, collate_fn=make_collator(tokenizer)), args.num_batches))

    model = get_dip_model(load_base(config), dip)
    if model.needs_calibration:
        model.calibrate(batches)
    sweep = model.noise_sweep(batches, args.stds)
    results = {
        "level": model.init_noise_std,
        "sweep": sweep,
        "provenance": provenance(__file__, asdict(config), seed=config.training_arguments().seed),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_results(args.output / "noise-level.json", results)
    plot_noise_level(str(args.output / "noise-level.json"), str(args.output / "noise-level.png"))
    print(f"Level {results['level']:.3g}; noise-level.png and noise-level.json are in {args.output}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a run with dip, see recipes/configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys of the configuration"
    )
    parser.add_argument("--stds", nargs="+", type=float, default=STDS, metavar="STD", help="in units of the scale")
    parser.add_argument("--num-batches", type=int, default=8, metavar="n", help="batches to measure on (8)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/noise-level"), metavar="FOLDER", help="for the files"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
