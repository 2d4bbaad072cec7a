from pathlib import Path

import pytest
from serving import NAME, model_of, tokenizer_of

from hybrid.training.callbacks import save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("served") / NAME
    save_folder(model_of(), tokenizer_of(), found)
    return found
