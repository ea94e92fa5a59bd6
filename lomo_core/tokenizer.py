"""Loading a model's tokenizer: no code from the folder, no network, and no torch: reading data needs none.

Chat templates and tokens are the same where torch is not there (`tests/unit/engine/test_data_check.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from lomo_core.errors import ModelError

# What transformers raises for folders that its own checks or a model's constructor refuse.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, AssertionError)


def silence_transformers() -> None:
    """Keep transformers' bars and advice off stderr: what matters is said in the journal."""
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(path: str | Path) -> Any:
    """Load the fast tokenizer of a checked folder; it has a padding token afterwards.

    Raises:
        ModelError: it cannot be loaded, or has neither padding nor end token.
    """
    silence_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except LOAD_ERRORS as error:
        raise ModelError(f"the model's tokenizer cannot be loaded: {error}", param="model") from error
    if not tokenizer.is_fast:
        raise ModelError("the model's tokenizer has no fast form (tokenizer.json): convert it first", param="model")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError("the model's tokenizer has neither a padding nor an end token", param="model")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
