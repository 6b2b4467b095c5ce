"""Where on the hub the model of a run goes, when the run is over."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from huggingface_hub import HfApi

# Of the library that the hub's client is built on, which changed with its second version.
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import AutoModelForImageClassification, TrainingArguments

from .classifiers import is_quantized


#: What a model of transformers is made of. Beside it lies what its stage was told.
FULL_PRECISION_FILES = ["README.md", "config.json", "preprocessor_config.json", "model*.safetensors", "*.index.json"]


@dataclass
class Destination:
    """A repository of the hub.

    Attributes:
        name: `user/name`, or a name among one's own.
        private: whether it is made for nobody else; None for what the user's settings on the hub say.
        revision: branch to push to; None for the main one.
    """

    name: str
    private: bool | None = None
    revision: str | None = None

    @classmethod
    def of(cls, training: TrainingArguments) -> Self | None:
        """What `--push_to_hub` and `--hub_model_id` ask for; by default the name is that of `output_dir`.

        Raises:
            ValueError: checkpoints are to be pushed as well.
        """
        if not training.push_to_hub:
            return None
        if training.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"hub_strategy is {training.hub_strategy.value!r}, and a run pushes its last model alone, when it is over:"
                f" leave it out"
            )
        name = training.hub_model_id or Path(training.output_dir).absolute().name
        return cls(name, training.hub_private_repo, training.hub_revision)

    def created(self) -> Self:
        """The same with the user's name, once it is there: what is not allowed is known before anything is computed.

        Raises:
            HfHubHTTPError: nobody is logged in, or may not write there.
            OSError: the hub cannot be reached.
        """
        with _reaching_the_hub("leave out --push_to_hub, and give it to the same command later"):
            return replace(self, name=HfApi().create_repo(self.name, private=self.private, exist_ok=True).repo_id)

    def push(self, folder: str) -> None:
        """The model of `folder`, its card and its image processor, and no path of this machine.

        Raises:
            OSError: the hub cannot be reached, or does not take it.
        """
        with _reaching_the_hub(f"the model is in {folder}; the same command pushes it later"):
            if is_quantized(folder):
                AutoModelForImageClassification.from_pretrained(folder).push_to_hub(self.name, revision=self.revision)
            else:
                HfApi().upload_folder(
                    repo_id=self.name, folder_path=folder, revision=self.revision, allow_patterns=FULL_PRECISION_FILES
                )


@contextlib.contextmanager
def _reaching_the_hub(way_out: str) -> Iterator[None]:
    """What the hub answers stays as it is, and OSError; that nobody answers becomes one."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise OSError(f"the hub cannot be reached ({type(error).__name__}: {error}): {way_out}") from error
