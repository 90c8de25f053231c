"""A quantized base model (bitsandbytes, 8 and 4 bits): noise, gradients, save and load, merge, and what is refused."""

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dipnet_hf import DipConfig, get_dip_model
from dipnet_hf.projection import DipProjection
from tests.helpers import logits
from tests.tiny_models import CAUSAL, NUM_LAYERS, build, make_batch

bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantized models need bitsandbytes")

QUANTIZATION = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
pytestmark = [
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]),
    pytest.mark.parametrize("bits", QUANTIZATION),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # raised by peft 0.21
    pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    build("llama", hidden_size=64).save_pretrained(path)
    return path


@pytest.fixture
def load(folder, bits, device):
    """Return a function that loads the same quantized model."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and bits == "nf4" and Version(bitsandbytes.__version__) < Version("0.50"):
        pytest.skip("4 bits on a CPU need bitsandbytes 0.50")

    def load_quantized():
        config = BitsAndBytesConfig(**QUANTIZATION[bits])
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": device})
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                # bitsandbytes 0.50: a forward in eval mode repacks the weights for a kernel without a gradient.
                module.support_avx512bf16_for_cpu = False
        return model

    return load_quantized


def make_config(weights, target_sites):
    if weights == "lora":
        weights = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return DipConfig(weights=weights, target_sites=target_sites, init_noise_std=0.1)


@pytest.mark.parametrize("target_sites", ["decoder_layer", "linear"])
@pytest.mark.parametrize("weights", ["lora", "frozen"])
def test_trains_saves_loads_and_merges(load, device, bits, weights, target_sites, tmp_path):
    base = load()
    batch = {name: tensor.to(device) for name, tensor in make_batch("llama").items()}
    plain = logits(base, batch)
    model = get_dip_model(base, make_config(weights, target_sites), calibration=[batch])
    assert len(model.logvars()) == NUM_LAYERS * (1 if target_sites == "decoder_layer" else CAUSAL["llama"].num_linears)

    model.train()
    model(**batch).loss.backward()
    for logvar in model.logvars():
        assert logvar.dtype == torch.float32 and logvar.device.type == device
        assert logvar.grad.isfinite().all() and logvar.grad.count_nonzero() > 0

    model.eval()
    expected = logits(model, batch), logits(model, batch, seed=0)
    assert not torch.equal(*expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), str(tmp_path))
    assert torch.equal(logits(loaded, batch), expected[0])
    assert torch.equal(logits(loaded, batch, seed=0), expected[1])

    stock = load()
    if weights == "lora":  # a merged weight is rounded to 8 or 4 bits again, so it is not the eval-mode output
        model.export_weights_adapter(tmp_path / "lora")
        stock = PeftModel.from_pretrained(stock, str(tmp_path / "lora")).merge_and_unload()
    merged = model.merge_and_unload()
    assert not [module for module in merged.modules() if isinstance(module, DipProjection)]
    assert torch.equal(logits(merged, batch), logits(stock, batch))


def test_after_prepare_model_for_kbit_training(load, device, bits):
    batch = {name: tensor.to(device) for name, tensor in make_batch("llama").items()}
    base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs={"use_reentrant": True})
    model = get_dip_model(base, make_config("lora", "decoder_layer"), calibration=[batch]).train()
    model(**batch).loss.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == NUM_LAYERS * (1 + 2 * CAUSAL["llama"].num_linears)
    for parameter in trainable.values():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0


def test_full_weights_are_refused(load):
    with pytest.raises(ValueError, match='weights="full" cannot train a quantized model.*LoraConfig'):
        get_dip_model(load(), DipConfig(weights="full"))
