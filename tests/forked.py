"""What the scripts share that fork processes which train for real: a corpus, and a quiet ground."""

import os

import torch

from modernbert_mini import data, model_card, pretraining

WORDS = "abcdefghijklmno"
TEXTS = tuple(" ".join([WORDS[i % 15]] * (5 + i % 23)) for i in range(150))


def prepare() -> None:
    """Make this process, and those that it will fork, fast: every corpus becomes ``TEXTS``."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    # Syncing is against power cuts: a killed process loses nothing that the kernel has. It is slow.
    os.fsync = lambda descriptor: None
    model_card.draw_curve = lambda facts, path: None  # the plot at the end takes most of the time
    pretraining.load_corpus = lambda name, config: data.Corpus(name, TEXTS, "", "CC0")
