"""PEFT knows the adapter by its type once this package is imported."""

from peft import AutoPeftModelForCausalLM

from tests.helpers import assert_same, save_two_adapters


def test_auto_class_loads_it(tmp_path):
    models = save_two_adapters(tmp_path)
    for name, model in models.items():
        assert_same(AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / name)), model)
