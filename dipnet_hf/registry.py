"""Registers the tuner with PEFT. The only file that touches `peft.mapping`.

`peft.utils.register_peft_method` accepts only members of PEFT's own closed enum, so an out-of-tree method writes its
plain string key into the three dictionaries that PEFT looks it up in.
"""

from typing import cast

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import DipConfig
from .model import DipModel

_KEY = cast(PeftType, "DIP")
PEFT_TYPE_TO_CONFIG_MAPPING[_KEY] = DipConfig
PEFT_TYPE_TO_TUNER_MAPPING[_KEY] = DipModel
PEFT_TYPE_TO_PREFIX_MAPPING[_KEY] = DipModel.prefix
