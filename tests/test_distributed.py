"""Two gloo processes, or four: one objective, one calibration, noise of their own; and FSDP2 as DDP."""

import contextlib
import types
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, cpu_offload, disk_offload
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from packaging.version import Version
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from dipnet_hf import GenerationCallback, dip_loss
from dipnet_hf.logvar_groups import share_level
from dipnet_hf.sharding import fill, is_sharded, local, whole
from dipnet_hf.trainer import check_strategy
from recipes.running import prepare_quantized
from tests.helpers import (
    WEIGHTS,
    collate,
    dip_model,
    gradients,
    logits,
    make_rows,
    make_trainer,
    record,
    run_in_processes,
    trained_model,
    word_tokenizer,
)
from tests.tiny_models import build, build_with_outliers


def make_model(noise, **config):
    """A model that is calibrated by its trainer, or, with `noise_scale="absolute"`, not at all."""
    config = {"num_samples": 2, "stability_loss_weight": 0.5} | config
    return dip_model(**config, **({} if noise else {"init_noise_std": 0.0, "prior_weight": 0.0}))


def train(folder, batch_size, noise, result):
    """Train two steps; save the weights, the logs, the scales and one noisy forward of each process."""
    model = make_model(noise)
    trainer = make_trainer(model, make_rows(), folder, per_device_train_batch_size=batch_size, optim="sgd")
    trainer.train()
    torch.manual_seed(0)
    with torch.no_grad(), model.sampling():
        noisy = model(**collate(list(make_rows())[:4])).logits
    logs = [
        {k: v for k, v in log.items() if k in ("loss", "nll", "prior", "stability")}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    torch.save({"weights": model.state_dict(), "logs": logs, "noisy": noisy}, result)


def train_rank(rank, folder):
    """What each of two processes does."""
    for noise in (False, True):
        train(folder, 4, noise, f"{folder}/{noise}-two-{rank}.pt")
    for static_graph in (False, True):
        result = gradients_of(
            DistributedDataParallel(make_model(True, noise_scale="absolute").train(), static_graph=static_graph), rank
        )
        torch.save(result, f"{folder}/gradients-{static_graph}-{rank}.pt")
    torch.save(watched_results(folder), f"{folder}/watched-{rank}.pt")
    check_parts(rank)
    compare_sharded(SHARDED, rank, folder)
    torch.save(calibration_results(rank, folder), f"{folder}/calibration-{rank}.pt")


def watched_results(folder):
    """What this process logs of three problems while training, and which of them it answers itself."""
    trainer = make_trainer(dip_model(), make_rows(), folder, eval_strategy="steps", eval_steps=1)
    trainer.processing_class = word_tokenizer()
    answered = []

    def is_right(answer, reference):
        answered.append(reference)
        return reference != 1

    trainer.add_callback(GenerationCallback(trainer, [[5, 9], [7], [4, 8]], [0, 1, 2], is_right, max_new_tokens=2))
    trainer.train()
    logged = [entry["eval_exact_match"] for entry in trainer.state.log_history if "eval_exact_match" in entry]
    return {"logged": logged, "answered": answered}


def gradients_of(model, rank):
    """The gradients of the second step, whose reduction a static graph has learnt from the first."""
    rows = list(make_rows())
    for _ in range(2):
        model.zero_grad()
        found = gradients(model, dip_loss(model, collate(rows[4 * rank : 4 * rank + 4])).loss)
    return found


def check_parts(rank):
    """Three values in two parts: two of them are in one process, and one is in the other."""
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.arange(3.0), mesh, [Shard(0)]))
    assert is_sharded(model)
    assert local(model.weight).tolist() == ([0, 1] if rank == 0 else [2])
    values = whole(model.weight)
    assert values.tolist() == [0, 1, 2]
    # Each process asks for another gradient, and the mean comes back.
    (values * torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)).sum().backward()
    assert whole(model.weight.grad).tolist() == [1.5, 3.0, 4.5]
    with torch.no_grad():
        fill(model.weight, torch.tensor([7.0, 8.0, 9.0]))
        assert whole(model.weight).tolist() == [7, 8, 9]
        fill(model.weight, torch.ones(()))
        assert local(model.weight).tolist() == [1.0] * (2 - rank)


# ---- FSDP2 by `fully_shard`, which is DDP with the parameters in parts ----


def shard(modules, **options):
    """Put modules into one group whose parameters are brought together at once, on the CPU."""
    return fully_shard(modules, **{"mesh": init_device_mesh("cpu", (distributed.get_world_size(),))} | options)


def shard_layers(model, **options):
    """Each layer, and the rest; as in most examples."""
    for layer in model.get_base_model().model.layers:
        shard(layer, **options)
    return shard(model, **options)


def shard_in_pairs(model):
    """Hybrid: parts on the two processes of a pair, the same parts on every pair."""
    return shard_layers(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def shard_as_accelerate(model, rank=0, from_rank_0=False):
    """What `Accelerator.prepare` does on GPUs; `from_rank_0`: the other processes' weights are of no account."""
    plugin = FullyShardedDataParallelPlugin(
        **{"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": from_rank_0},
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = types.SimpleNamespace(
        **{"mixed_precision": "no", "device": torch.device("cpu"), "is_main_process": rank == 0},
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={(): init_device_mesh("cpu", (distributed.get_world_size(),))},
        parallelism_config=types.SimpleNamespace(fsdp_dim_names=[]),
    )
    return fsdp2_prepare_model(accelerator, model)


def shard_head(model):
    """The head by itself, which is in parts again when the loss is computed."""
    shard(model.get_base_model().lm_head, reshard_after_forward=True)
    return shard_layers(model)


def four_bit_llama():
    """A quantized base, whose packed weights have a type that can be in parts."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    model, storage = build("llama", hidden_size=64), {"quant_type": "nf4", "quant_storage": torch.float32}
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                packed = Linear4bit(module.in_features, module.out_features, bias=False, **storage)
                packed.weight = Params4bit(module.weight.data, requires_grad=False, module=packed, **storage).to("cpu")
                layer.set_submodule(name, packed)
    model.is_loaded_in_4bit = True
    return prepare_quantized(model)


SHARDED = {
    "lora": (shard_layers, {"weights": WEIGHTS["lora"]("llama")}),
    "full": (shard_as_accelerate, {}),
    "frozen": (shard, {"weights": "frozen", "granularity": "layer"}),
    "resharded-head": (shard_head, {"stability_target": "logits"}),
    "tied-head": (shard_layers, {"base": "gemma3_text"}),
    "embedding": (shard_layers, {"target_sites": "embedding"}),
    "one-sample": (shard_layers, {"num_samples": 1, "stability_loss_weight": 0.0}),
    "checkpointed": (shard_layers, {"checkpointed": True}),
    "checkpointed-lora": (shard_as_accelerate, {"checkpointed": True, "weights": WEIGHTS["lora"]("llama")}),
}
if find_spec("bitsandbytes") and Version(metadata.version("bitsandbytes")) >= Version("0.50"):  # 4 bits on a CPU
    SHARDED["four-bits"] = (shard_layers, {"base": four_bit_llama, "weights": WEIGHTS["lora"]("llama")})
FOUR_PROCESSES = {
    "four": (shard_as_accelerate, {}),
    "hybrid": (shard_in_pairs, {"weights": WEIGHTS["lora"]("llama")}),
}


def sharded_results(case, sharded, rank):
    """The terms, gradients and noise of a step of two batches, whose gradients are reduced once; and the logits."""
    shard_model, config = case
    checkpointed = config.get("checkpointed", False)
    config = {name: value for name, value in config.items() if name != "checkpointed"}
    if callable(config.get("base")):
        config["base"] = config["base"]()
    # A prior around another level has a gradient from the beginning.
    model = make_model(True, noise_scale="absolute", prior_std=0.1, prior_weight=1.0, **config).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    outputs = record(model, ["base_model.model"], at_output=True)["base_model.model"]
    wrapped = shard_model(model) if sharded else DistributedDataParallel(model)
    rows, losses = list(make_rows()), []  # fewer in one process
    for step in range(2):
        is_last = step == 1
        if sharded:
            wrapped.set_requires_gradient_sync(is_last)
        with contextlib.nullcontext() if sharded or is_last else wrapped.no_sync():
            torch.manual_seed(step)
            losses.append(
                dip_loss(wrapped, collate(rows[(8 * rank + 4 * step) % 16 :][: 4 - rank]), num_items_in_batch=70)
            )
            losses[-1].loss.backward()
    found = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.requires_grad}
    share_level(model.logvars())
    return {
        "losses": torch.tensor([[term.item() for term in loss] for loss in losses]),
        "gradients": found,
        "shared": [whole(logvar.grad).clone() for logvar in model.logvars()],
        "noise": model.noise_summary(),
        "num_tokens_with_logits": [output.logits.shape[1] for output in outputs],
    }


def compare_sharded(cases, rank, folder):
    """What each process does for the cases, sharded and under DDP."""
    for name, case in cases.items():
        for sharded in (False, True):
            torch.save(sharded_results(case, sharded, rank), f"{folder}/{name}-{sharded}-{rank}.pt")


def compare_sharded_in_four(rank, folder):
    """What each of four processes does."""
    distributed.init_process_group("gloo")
    compare_sharded(FOUR_PROCESSES, rank, folder)
    distributed.destroy_process_group()


def calibration_results(rank, folder):
    """The noise that calibration finds before a model is sharded, and after, where it began on one process alone."""
    batch = [collate(list(make_rows())[8 * rank : 8 * rank + 8])]
    before, model = (make_model(True, base=build_with_outliers(), init_noise_std="auto") for _ in range(2))
    before.calibrate(batch)
    if rank == 1:
        model.to("meta")  # as transformers leaves it: without parameters, but with buffers
        model.get_base_model().model.rotary_emb = before.get_base_model().model.rotary_emb
    model = shard_as_accelerate(model, rank, from_rank_0=True)
    assert model.needs_calibration
    with pytest.raises(ValueError, match="give that as wrapped=..., or calibrate before"):
        model.calibrate(batch)
    model.calibrate(batch, wrapped=model)
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{folder}/sharded", state_dict=state_dict)
        loaded = PeftModel.from_pretrained(build_with_outliers(), f"{folder}/sharded").eval()
        expected = logits(before.eval(), batch[0], seed=1)
        torch.testing.assert_close(logits(loaded, batch[0], seed=1), expected, atol=1e-5, rtol=1e-5)
    return {"before": before.noise_summary(), "after": model.noise_summary()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    run_in_processes(2, train_rank, folder)
    run_in_processes(4, compare_sharded_in_four, folder)
    return folder


@pytest.fixture(params=[False, True], ids=["noise-off", "noise-on"])
def results(request, runs):
    """Whether noise was on, the results of both processes, and of one process on the joined batches."""
    noise = request.param
    train(runs, 8, noise, f"{runs}/{noise}-one.pt")
    names = ("two-0", "two-1", "one")
    return noise, *(torch.load(f"{runs}/{noise}-{name}.pt", weights_only=True) for name in names)


def test_ranks_agree_on_calibration_and_weights(results):
    _, first, second, one = results
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
        if "dip_scale" in name:
            # Both loaders give all rows of one epoch, so two processes have measured what one has.
            torch.testing.assert_close(tensor, one["weights"][name], atol=1e-6, rtol=1e-5)


def test_two_processes_equal_one_on_the_joined_batch_without_noise(results):
    noise, first, _, one = results
    if noise:
        assert first["logs"] != one["logs"]
        return
    for ours, theirs in zip(first["logs"], one["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-9)
    for name, tensor in first["weights"].items():
        torch.testing.assert_close(tensor, one["weights"][name], atol=1e-6, rtol=1e-5)


def test_ranks_draw_different_noise_from_the_same_seed(results):
    noise, first, second, _ = results
    assert torch.equal(first["noisy"], second["noisy"]) != noise


@pytest.mark.parametrize("static_graph", [False, True])
def test_gradients_are_averaged_though_the_loss_is_computed_from_hidden_states(runs, static_graph):
    first, second = (torch.load(f"{runs}/gradients-{static_graph}-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
    assert any("lm_head" in name for name in first) and any("dip_logvar" in name for name in first)


def test_processes_share_the_problems_that_are_generated_while_training(runs):
    first, second = (torch.load(f"{runs}/watched-{rank}.pt") for rank in (0, 1))
    assert (first["answered"], second["answered"]) == ([0, 2] * 2, [1] * 2)
    assert first["logged"] == second["logged"] == [pytest.approx(2 / 3)] * 2


@pytest.mark.parametrize("name", [*SHARDED, *FOUR_PROCESSES])
def test_fsdp_trains_as_ddp_does(runs, name):
    for rank in range(4 if name in FOUR_PROCESSES else 2):
        expected, actual = (torch.load(f"{runs}/{name}-{sharded}-{rank}.pt") for sharded in (False, True))
        torch.testing.assert_close(actual["losses"], expected["losses"], atol=1e-6, rtol=1e-6)
        assert actual["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            torch.testing.assert_close(actual["gradients"][parameter], gradient, atol=1e-6, rtol=1e-5, msg=parameter)
        torch.testing.assert_close(actual["shared"], expected["shared"], atol=1e-6, rtol=1e-5)
        assert actual["noise"] == expected["noise"]
        # Those of the probe, and of no token of the two batches.
        assert actual["num_tokens_with_logits"][-2:] == [0, 0]


def test_a_sharded_model_is_calibrated_as_a_whole_one(runs):
    first, second = (torch.load(f"{runs}/calibration-{rank}.pt") for rank in (0, 1))
    assert first == second
    for before, after in zip(first["before"], first["after"], strict=True):
        assert before.pop("name") == after.pop("name")
        assert after == pytest.approx(before, rel=1e-5)


# ---- what is refused ----


def test_a_model_that_fsdp1_has_flattened_is_refused():
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # needs a group of processes
    with pytest.raises(ValueError, match="FSDP1 .* is not supported.*fully_shard"):
        dip_loss(wrapped, collate(list(make_rows())))


def test_a_model_that_transformers_has_split_is_refused(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_is_distributed_loading_by_transformers", True)
    with pytest.raises(ValueError, match="loaded with a distributed_config"):
        dip_model()


STRATEGIES = {
    "FSDP1 is not supported.*Set fsdp_version: 2": {"fsdp_plugin": types.SimpleNamespace(fsdp_version=1)},
    "Megatron-LM is not supported": {"distributed_type": DistributedType.MEGATRON_LM},
    "tp_size=2 and cp_size=4 of parallelism_config": {
        "parallelism_config": types.SimpleNamespace(tp_size=2, cp_size=4, sp_size=1)
    },
    None: {
        "fsdp_plugin": types.SimpleNamespace(fsdp_version=2),
        "parallelism_config": types.SimpleNamespace(tp_size=1, cp_size=1, sp_size=1, dp_shard_size=8),
    },
}


@pytest.mark.parametrize("message", STRATEGIES)
def test_a_strategy_on_which_the_objective_is_not_right_is_refused(message):
    state = types.SimpleNamespace(**{"distributed_type": DistributedType.FSDP} | STRATEGIES[message])
    accelerator = types.SimpleNamespace(state=state, parallelism_config=getattr(state, "parallelism_config", None))
    refusal = contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with refusal:
        check_strategy(accelerator)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_models_noise_is_brought_back_or_refused(place, tmp_path):
    model = trained_model()
    expected, noisy = logits(model), logits(model, seed=3)
    folder = {"offload_dir": str(tmp_path)} if place == "disk" else {}
    offload = disk_offload if folder else cpu_offload
    offload(model, **folder, execution_device="cpu", preload_module_classes=["DipProjection"])
    assert torch.equal(logits(model), expected) and torch.equal(logits(model, seed=3), noisy)

    model = offload(trained_model(), **folder, execution_device="cpu")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"offloaded.*preload_module_classes=\[\"DipProjection\"\]"):
        logits(model, seed=3)
