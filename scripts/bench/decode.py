"""Time per position of a search on one GPU. `python -m scripts.bench.decode`, 2 minutes.

Models have random weights in bf16. Sources have 32 subwords with the end of sentence. No translation ends before
position 40. `live` launches each kernel from the host; `recorded` is what `nmt translate` does. Both are in this run.
The bound of a model with experts is the bytes of the experts that are active at a position, at the bandwidth of a copy
measured in the same run.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nmt.compose import compose_config
from nmt.config import DecodingConfig
from nmt.decoding.lanes import Run
from nmt.decoding.rules import Rules
from nmt.decoding.search import Search
from nmt.decoding.searcher import Searcher
from nmt.decoding.translation import Options
from nmt.model.seq2seq import Seq2Seq
from nmt.model.working import WorkingWeights
from scripts.bench.gpu import ceilings

# Milliseconds per position of NVIDIA's PyTorch GNMT v2 code on one H100, the range of several runs.
GNMT_V2 = {(128, 1): (1.74, 2.47), (128, 5): (2.39, 3.59), (512, 5): (4.04, 4.14), (1, 5): (2.12, 3.02)}
POSITIONS, SOURCE, VOCABULARY = 40, 32, 32_000
MODELS = {
    "GNMT v2": ["experiment=wmt14_en_de_gnmt_v2"],
    "no MoE": ["experiment=europarl_en_fr_dense"],
    "MoE-32": ["experiment=europarl_en_fr_moe_32"],
    "MoE-512": ["experiment=europarl_en_fr_moe_32", "model.moe.num_experts=512"],
    "MoE-2048": ["experiment=wmt14_en_fr_moe_2048"],
}


def random_model(settings: list[str], device: torch.device) -> Seq2Seq:
    """A model in bf16 with random weights, made on the GPU."""
    config = compose_config(settings).model
    with torch.device(device):
        model = Seq2Seq(config, VOCABULARY).eval()
    # Gates start at zero, and would send all tokens to the same experts.
    for name, parameter in model.named_parameters():
        if "w_gate" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return WorkingWeights(model, device, torch.bfloat16).model


def begin(searcher: Searcher, sentences: int, beam: int) -> Run:
    """A recorded search of random sources, none of whose translations ends."""
    options = replace(Options.of(DecodingConfig()), beam_size=beam, max_length_ratio=4.0)
    rng = np.random.default_rng(0)
    sources = [rng.integers(4, VOCABULARY, SOURCE - 1) for _ in range(sentences)]
    longest_B = torch.full((sentences,), 4 * SOURCE)
    return searcher.lanes(options).begin(sources, Rules(longest_B, longest_B, searcher.forbidden_F))


def milliseconds(search: Search, advance: Any) -> float:
    """Time per position by device events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    advance()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (POSITIONS - 4)


def live(search: Search) -> None:
    for _ in range(POSITIONS - 4):
        search.advance()


def kernels(run: Run) -> list[tuple[str, int, float]]:
    """The kernels of a position: name, launches, and microseconds of all of them."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run.lane.advance(4)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    rows = [(name, round(len(times) / 4), sum(times) / 4) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def active_bytes(model: Seq2Seq, search: Search) -> int:
    """Bytes of the experts that have a token at one position."""
    state = search.beam.state
    gates = model.step(search.beam.previous_KB.flatten(), state.memory, state.decoder).gates
    found = 0
    for layer, gate in gates.items():
        weights = model.moe_layers()[layer].experts.weights
        each = sum(w_EIO[0].numel() * w_EIO.element_size() for w_EIO in weights)
        found += each * int((gate.sums.count_E > 0).sum())
    return found


def bench(
    name: str, model: Seq2Seq, device: torch.device, shapes: list[tuple[int, int]], shown: int, copied: float
) -> list[dict[str, Any]]:
    """Time the positions of a model for these numbers of sentences and hypotheses; `copied`: bandwidth in TB/s."""
    searcher = Searcher([model], device, range(3))
    rows = []
    for sentences, beam in shapes:
        times = []
        for _ in range(3):
            run = begin(searcher, sentences, beam)
            times.append(milliseconds(run.lane.search, lambda run=run: run.lane.advance(POSITIONS - 4)))
        search = begin(searcher, sentences, beam).lane.search
        slow = milliseconds(search, lambda search=search: live(search))
        active = active_bytes(model, search)
        row = {"model": name, "sentences": sentences, "beam": beam, "recorded": min(times), "live": slow}
        rows.append(row | {"active_bytes": active})
        peer = GNMT_V2.get((sentences, beam)) if name == "GNMT v2" else None
        told = f"   NVIDIA {peer[0]}-{peer[1]}" if peer else ""
        if active:
            told = f"   experts {active / 1e9:.2f} GB, {active / copied / 1e9:.3f} ms at {copied:.2f} TB/s"
        print(f"{name:<10} {sentences:>4} x {beam}  {min(times):7.3f} ms  live {slow:7.3f} ms{told}", flush=True)
        if shown:
            found = kernels(begin(searcher, sentences, beam))
            print(f"   {sum(count for _, count, _ in found)} kernels, {sum(us for *_, us in found):.0f} us")
            for kernel, count, us in found[:shown]:
                print(f"   {us:8.1f} us  {count:>3} x  {kernel[:90]}")
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--shown", type=int, default=0, help="kernels to list for each row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    copied = ceilings(device)["copy_tbs"]
    rows = []
    for name in options.models.split(","):
        model = random_model(MODELS[name], device)
        shapes = [*GNMT_V2] if name == "GNMT v2" else [(128, 5)]
        rows += bench(name, model, device, shapes, options.shown, copied)
        del model
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(
            json.dumps({"card": torch.cuda.get_device_name(), "copy_tbs": copied, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
