"""The modes of a network's modules come back, each its own, also after an error."""

import pytest
from torch import nn

from dipnet_hf.modes import in_eval_mode


def test_every_module_is_in_its_own_mode_again():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError, match="out of memory"), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("out of memory")
    assert [module.training for module in model.modules()] == [True, True, False]
