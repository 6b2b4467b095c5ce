"""Extremely low-bit vision transformers for the Hugging Face ecosystem.

Importing this package registers `quantformer` with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModelForImageClassification

from .callbacks import QuantformerCallback
from .configuration_quantformer import QuantformerConfig
from .modeling_quantformer import QuantformerForImageClassification, StageError
from .pretrained import QuantformerPreTrainedModel
from .trainer import QuantformerTrainer
from .training_args import QuantformerTrainingArguments
from .version import __version__


AutoConfig.register("quantformer", QuantformerConfig)
AutoModelForImageClassification.register(QuantformerConfig, QuantformerForImageClassification)

__all__ = [
    "QuantformerCallback",
    "QuantformerConfig",
    "QuantformerForImageClassification",
    "QuantformerPreTrainedModel",
    "QuantformerTrainer",
    "QuantformerTrainingArguments",
    "StageError",
    "__version__",
]
