from pathlib import Path

import pytest
import torch

from blockdraft import ZayaForCausalLM
from checkpoints import random_model, save, tiny_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(tiny_config()), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", params=DTYPES)
def tiny(request: pytest.FixtureRequest, tiny_folder: Path) -> ZayaForCausalLM:
    """A tiny random model, in float32 and in bfloat16."""
    return ZayaForCausalLM.from_pretrained(tiny_folder, dtype=DTYPES[request.param], progress=False)
