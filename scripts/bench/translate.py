"""Sentences per second of a search on the CPU, by precision, beam size and threads. Part of `make bench`, 3 minutes.

    python scripts/bench/translate.py
    python scripts/bench/translate.py --tokens 512 1024 2048 4096 8192     # decoding.batch_tokens

The model has 2 + 2 LSTM layers of 512, no MoE, a vocabulary of 8,000 subwords and random weights. Sources have 8 to 21
subwords, and every translation is made to have 16: so all precisions do the same work. The works take turns, and a
figure is the median over the turns, because other work on the machine comes and goes. Ratios are to float32 with the
same beam size and threads.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

# As the command line has it, and before PyTorch is loaded: see nmt/cli.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch

from nmt.compose import compose_config
from nmt.config import DecodingConfig
from nmt.decoding.loading import prepared
from nmt.decoding.searcher import Searcher
from nmt.decoding.translation import Options
from nmt.model.seq2seq import Seq2Seq
from nmt.tokens import BOS, NUM_SPECIAL, PAD, UNK

VOCABULARY, PIECES = 8000, 16
CPU = torch.device("cpu")
PRECISIONS = {
    "fp32": DecodingConfig(precision="fp32"),
    "bf16": DecodingConfig(precision="bf16"),
    "int8": DecodingConfig(quantize="int8"),
}


def sources_of(sentences: int) -> list[np.ndarray]:
    """Random sources of 8 to 21 subwords."""
    rng = np.random.default_rng(2)
    return [rng.integers(NUM_SPECIAL, VOCABULARY, size=length) for length in rng.integers(8, 22, sentences)]


def options_of(beam_size: int, batch_tokens: int) -> Options:
    """The options of a search whose results all have `PIECES` subwords."""
    options = Options.of(DecodingConfig(beam_size=beam_size, batch_tokens=batch_tokens))
    return replace(options, min_length=PIECES, max_length=PIECES)


def main(arguments: list[str] | None = None) -> int:
    """Time all works in turns and print a table; --json also writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0], help="decoding.batch_tokens")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--turns", type=int, default=7)
    asked = parser.parse_args(arguments)
    torch.manual_seed(1)
    model = Seq2Seq(compose_config(["model=medium", "model.moe.num_experts=0"]).model, VOCABULARY).eval()
    searchers = {
        name: Searcher([prepared(model, CPU, PRECISIONS[name])], CPU, [PAD, UNK, BOS]) for name in asked.precisions
    }
    sources = sources_of(asked.sentences)
    works = [
        (name, threads, beam, tokens)
        for threads in asked.threads
        for beam in asked.beams
        for tokens in asked.tokens
        for name in asked.precisions
    ]
    seconds: dict[tuple[str, int, int, int], list[float]] = {work: [] for work in works}
    for turn in range(asked.turns + 1):
        for name, threads, beam, tokens in works:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            found = searchers[name].search(sources, options_of(beam, tokens))
            if turn:  # the first one warms up
                seconds[name, threads, beam, tokens].append(time.perf_counter() - start)
            assert all(len(best.tokens) == PIECES for (best,) in found)
    amx = "with" if torch.cpu._is_amx_tile_supported() else "without"
    print(f"PyTorch {torch.__version__}, processor {amx} AMX, {asked.sentences} sentences\n")
    print(f"{'precision':<11}{'threads':>8}{'beam':>6}{'batch tokens':>14}{'sentences/s':>13}{'over fp32':>11}")
    rows = []
    for name, threads, beam, tokens in works:
        own, plain = seconds[name, threads, beam, tokens], seconds.get(("fp32", threads, beam, tokens), [])
        speed = asked.sentences / statistics.median(own)
        ratio = statistics.median(b / a for a, b in zip(own, plain, strict=True)) if plain else float("nan")
        print(f"{name:<11}{threads:>8}{beam:>6}{tokens or 'default':>14}{speed:>13.0f}{ratio:>11.2f}")
        rows.append({"precision": name, "threads": threads, "beam": beam, "tokens": tokens, "speed": speed})
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
