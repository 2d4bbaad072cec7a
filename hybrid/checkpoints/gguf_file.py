"""The weights of a GGUF file, one at a time: unpacked by `gguf`, named and put in order by transformers' own tables."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybrid.checkpoints.tensorfile import CheckpointError, Entry, shown
from hybrid.checkpoints.weights import Weights
from hybrid.config import HybridConfig


def gguf_weights(file: Path, config: HybridConfig, model: type[PreTrainedModel], model_type: str) -> Weights:
    """What lies in a GGUF file, under the names of transformers' model of that kind. Once unpacked, all is float32.

    Args:
        file: the GGUF file.
        config: what the file says of the model.
        model: the class of model that has the same names.
        model_type: what transformers calls its kind.

    Raises:
        ValueError: what reads such files is not installed.
        CheckpointError: the file is cut short or damaged.
    """
    require_gguf(file)
    from gguf import GGUFReader, dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    with reading(file):
        found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        layers = config.num_hidden_layers
        if layers > len(found):
            raise CheckpointError(f"{file}: {layers:,} layers, and {len(found)} tensors: it is damaged.")
        processor = TENSOR_PROCESSORS.get(model_type, TensorProcessor)(config=config.to_dict())
        with torch.device("meta"):
            like = model(config)
        names = get_gguf_hf_weights_map(like, processor, model_type=model_type, num_layers=layers)
        # What has no name there is no weight: frequencies of RoPE, say.
        tensors = {names[name]: x for name, x in found.items() if name in names}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        with reading(file):
            done = processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name, tensor_key_mapping=names,
                parsed_parameters={"tensors": {}},
            )  # fmt: skip
            return torch.from_numpy(done.weights.copy())

    shapes = {name: tuple(int(size) for size in reversed(x.shape)) for name, x in tensors.items()}
    return Weights.computed({name: Entry("F32", shape) for name, shape in shapes.items()}, read)


def require_gguf(file: Path) -> None:
    """Raise a ValueError where GGUF files cannot be read, or this is none; it says what to install."""
    if missing := [name for name in ("accelerate", "gguf") if find_spec(name) is None]:
        raise ValueError(f"A GGUF file is read with {' and '.join(missing)}: pip install 'hybrid-lm[gguf]'.")
    with file.open("rb") as head:
        if head.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is no GGUF file, or damaged: it does not begin as one.")


@contextlib.contextmanager
def reading(file: object, keep: tuple[type[Exception], ...] = (OSError, CheckpointError)) -> Iterator[None]:
    """What the readers of GGUF files make of one that is damaged, as one error that names it; not those in `keep`."""
    try:
        yield
    except keep:
        raise
    except Exception as error:  # they run over the end, or take it at its word
        raise CheckpointError(f"{file} is cut short or damaged ({shown(str(error))}).") from error
