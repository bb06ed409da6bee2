"""The Trainer methods that WanTrainer overrides still have the signatures it was written for."""

import inspect

import pytest
import transformers
from packaging.version import Version
from transformers import Trainer

from wan_accel import trainer
from wan_accel.trainer import WanTrainer

# Parameters of the library's methods, from transformers 5.17 to 5.23.
SIGNATURES = {
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "get_train_dataloader": ["self"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "create_optimizer": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_clip_grad_norm": ["self", "model"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "log": ["self", "logs", "start_time"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == SIGNATURES[name]


def test_the_table_lists_every_override() -> None:
    overridden = {name for name in vars(WanTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert overridden == set(SIGNATURES)
    for name in SIGNATURES:
        assert name in (trainer.__doc__ or "")


def test_version_is_one_that_was_checked() -> None:
    assert Version("5.17") <= Version(transformers.__version__) < Version("5.24")
