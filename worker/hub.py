"""`python -m worker.hub REPO_ID CACHE_DIR`: download a base model from the Hugging Face hub and print its folder.

A process of its own: the download can be ended like an engine (cancel, shutdown, lost lease), and the hub's client with
its many imports stays out of the worker. Weights other than safetensors and any code are never fetched.
"""

from __future__ import annotations

import sys

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from lomo_core.death_watch import start_death_watch

# What a causal language model and its tokenizer consist of; no *.bin (pickle) and no *.py.
ALLOW_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "vocab.txt", "merges.txt")
# Copies of the weights for other programs, in folders beside them.
IGNORE_PATTERNS = ("*/*",)


def main(arguments: list[str]) -> int:
    """Download, and print the folder as the last line. Returns the exit code; the reason of a failure is printed."""
    repo_id, cache_dir = arguments
    start_death_watch()
    try:
        folder = snapshot_download(
            repo_id,
            cache_dir=cache_dir,
            allow_patterns=list(ALLOW_PATTERNS),
            ignore_patterns=list(IGNORE_PATTERNS),
        )
    except GatedRepoError:
        return _refuse(f"{repo_id} is gated: accept its terms on the hub and give the worker HF_TOKEN.")
    except RepositoryNotFoundError:
        return _refuse(f"The hub has no model {repo_id}, or it is private.")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        return _refuse(f"The model {repo_id} could not be downloaded from the hub: {str(error).splitlines()[0]}")
    sys.stdout.write(f"{folder}\n")
    return 0


def _refuse(reason: str) -> int:
    sys.stdout.write(f"{reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
